import hashlib
import importlib.resources
import re


def test_samples_are_the_files_whose_digests_the_readme_gives():
    root = importlib.resources.files("tenfold.samples")
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (root / "README.md").read_text(), re.MULTILINE))
    listed = {name: digest for digest, name in listed.items()}
    found = {
        f"{top}{entry.name}": hashlib.sha256(entry.read_bytes()).hexdigest()
        for top in (
            "flores101/dev/",
            "flores101/devtest/",
            "instruct/",
            "models/stories260K/",
            "preference/",
            "spatial/",
            "tokenizers/gpt2/",
        )
        for entry in (root / top).iterdir()
        if entry.is_file()
    }
    assert found == listed
