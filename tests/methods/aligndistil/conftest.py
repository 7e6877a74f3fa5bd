"""What tests of AlignDistil on several ranks share."""

import json

import pytest

SUBJECTS = ["Tom", "Lily", "The bird", "A cat", "Mom", "The sun"]


@pytest.fixture(scope="module")
def uneven_pairs(tmp_path_factory):
    """Return a function: number -> file of so many pairs of unequal lengths; ranks get unequal numbers of tokens."""

    def write(number):
        path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
        rows = [
            {
                "prompt": f"{SUBJECTS[place % len(SUBJECTS)]} {'very ' * (place % 3)}big {place}",
                "chosen": " and happy." * (1 + place % 4),
                "rejected": " or sad" * (1 + place % 5),
            }
            for place in range(number)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write
