"""Settings and small real objects that every test shares: no network, no login files, tiny models made in memory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two tests run at a time
os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # numba compiles no code that prints once Ray has replaced it
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")  # of the S3 server that tests start, which looks at none
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # every report waits for it; Ray's default is 2

import contextlib
import functools
import gc
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# Ray's workers import what these folders hold beside the tests.
RAY_MODULES = [Path(__file__).parent / "platform" / name for name in ("training", "tuning")]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Edit the following sentence for grammar. He go to the park every day.",
    "He goes to the park every day. Convert 45 kilometers to meters. 45 kilometers is 45000 meters.",
    "What is the capital of France? The capital of France is Paris.",
    "Name three colours: red, green and blue. The chef cooks the meal every day.",
]


@functools.cache
def uses_shared_cluster(path: Path) -> bool:
    """Say whether a file's tests use `ray_session`."""
    return "ray_session" in path.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items):
    """Put files that share a cluster next to each other, at the end.

    Other tests measure the memory of all processes that this one has had.
    """
    items.sort(key=lambda item: uses_shared_cluster(item.path))


def pytest_collection_finish():
    """Keep the imported modules out of garbage collection: Trainers and engines start it often, and wait for it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """End the shared cluster before a test that does not use it: some tests are about what happens without one."""
    if "ray_session" in item.fixturenames and "ray_session" not in getattr(nextitem, "fixturenames", ()):
        from tenfold.platform import cluster

        cluster.shutdown()


@pytest.fixture(scope="module")
def ray_session():
    """Connect to a cluster of two cores, which the next file goes on to use: starting one takes ten seconds."""
    from tenfold.platform import cluster

    with pytest.MonkeyPatch.context() as patch:
        for folder in RAY_MODULES:
            patch.syspath_prepend(str(folder))
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        cluster.connect(num_cpus=2, include_dashboard=False)
        yield


@pytest.fixture(scope="module")
def own_cluster():
    """Start a cluster of two cores for one file: earlier trainings may have left something on the shared one.

    Ray Data and training workers that need all of its cores would wait for them without an end.
    """
    from tenfold.platform import cluster

    cluster.shutdown()
    cluster.connect(num_cpus=2, include_dashboard=False)
    yield
    cluster.shutdown()


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory):
    """Return a function that puts an MLflow database without runs into a folder: making one takes seconds."""
    from mlflow import MlflowClient

    made = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{made}").search_experiments()

    def put(folder: Path) -> str:
        return f"sqlite:///{shutil.copy(made, folder / 'mlflow.db')}"

    return put


@pytest.fixture
def tenfold(tmp_path, monkeypatch, capsys, caplog):
    """Return tenfold(*arguments) -> (exit code, output, errors): the command in this process, in an empty folder.

    It must not start Ray.
    """
    from tenfold.platform import cli, cluster

    def refuse_to_start(**arguments):
        raise AssertionError("Ray was to be started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "no-cluster"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "connect", refuse_to_start)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tenfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def free_port():
    """Return a function that gives a TCP port of the loopback interface on which nothing listens."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


class MLflowServer:
    """An MLflow server of this machine, with all its processes.

    Args:
        folder: for artifacts and its log.
        port: on the loopback interface.
        store: URI of its database.
        workers: processes that answer.
    """

    def __init__(self, folder: Path, port: int, store: str, workers: int = 1) -> None:
        command = [
            str(Path(sys.executable).parent / "mlflow"),
            "server",
            f"--backend-store-uri={store}",
            f"--artifacts-destination={folder}/artifacts",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--workers={workers}",
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        end = time.monotonic() + 180
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"the MLflow server did not start: {(folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it as a lost machine would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def mlflow_server():
    """Return the class of a server that answers on loopback once it is made: mlflow_server(folder, port, store)."""
    return MLflowServer


@pytest.fixture(scope="module")
def short_folder():
    """Return a folder with a short path: a socket's path has at most 107 characters, and Ray's lie below it."""
    path = Path(tempfile.mkdtemp(prefix="tf-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Return a 320-entry byte-level BPE with a chat template, built in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama():
    """Return a factory of fresh small Llama models: tiny_llama(vocab=320, hidden=32, layers=2, seed=0)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(
        vocab: int = 320, hidden: int = 32, layers: int = 2, seed: int = 0, tied: bool = True
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_tokenizer, tiny_llama) -> Path:
    """Return a folder that `from_pretrained` loads: a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
