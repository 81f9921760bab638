"""Config files cannot run code or exhaust the memory."""

import os

import pytest
from detectron2.config import get_cfg

from locreweight.config import load_config
from locreweight.errors import UsageError

ATTACKS = {
    "a call": "SEED: !!python/object/apply:os.mkdir ['{target}']",
    "a call by its name": "SEED: !!python/object/apply:os.system ['mkdir {target}']",
    "a new object": "SEED: !!python/object/new:os.mkdir ['{target}']",
    "a process": "SEED: !!python/object/apply:subprocess.call [[mkdir, '{target}']]",
    "evaluated text": (
        "SEED: !!python/object/apply:builtins.eval [\"__import__('os').mkdir('{target}')\"]"
    ),
    "as a key": "? !!python/object/apply:os.mkdir ['{target}']\n: 1",
    "at the top": "!!python/object/apply:os.mkdir ['{target}']",
    "behind an alias": "A: &a !!python/object/apply:os.mkdir ['{target}']\nSEED: *a",
    "in a list": "DATASETS:\n  TRAIN:\n  - !!python/object/apply:os.mkdir ['{target}']",
}
# How the given file refers to the file with the attack.
BASES = {
    "itself": None,
    "base": "_BASE_: attack.yaml",
    "one of several bases": "_BASE_: [fine.yaml, attack.yaml]",
    "base of a base": "_BASE_: between.yaml",
}


def write(folder, attack):
    """Write the attack and files that refer to it; returns the folder that it would create."""
    target = folder / "ran"
    (folder / "attack.yaml").write_text(attack.format(target=target))
    (folder / "fine.yaml").write_text("SEED: 3")
    (folder / "between.yaml").write_text("_BASE_: attack.yaml\nSEED: 3")
    return target


@pytest.mark.parametrize("way", BASES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_config_file_runs_no_code(tmp_path, attack, way):
    target = write(tmp_path, ATTACKS[attack])
    file = tmp_path / "attack.yaml"
    if BASES[way]:
        file = tmp_path / "given.yaml"
        file.write_text(f"{BASES[way]}\nSEED: 3")
    with pytest.raises(UsageError, match=r"cannot read the config file .*\.yaml") as caught:
        load_config(str(file), [])
    assert not target.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", ["a call", "a new object", "a process", "behind an alias"])
def test_attacks_work_with_detectron2_alone(tmp_path, attack):
    """Its documentation says so."""
    target = write(tmp_path, ATTACKS[attack])
    with pytest.raises(Exception):  # noqa: B017  (the result may not be a valid value)
        get_cfg().merge_from_file(str(tmp_path / "attack.yaml"))
        raise ValueError("the result was a valid value")
    assert target.exists()


def test_options_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("__import__('os').mkdir('ran')", "!!python/object/apply:os.mkdir ['ran']"):
        with pytest.raises(UsageError):
            load_config("", ["SEED", value])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"_BASE_: given.yaml", "recursion"),
        (b"_BASE_: [given.yaml]", "recursion"),
        (b"SEED: \xff\xfe", "can't decode|not accepted|invalid"),
        (b"SEED: \x00", "special characters are not allowed"),
        (b"SEED: " + b"[" * 5000, "recursion"),
        (b"1: 2", "given.yaml"),
        (b"_BASE_: 3", "given.yaml"),
        (b"_BASE_: .", "given.yaml"),
        (b"3", "given.yaml"),
    ],
)
def test_unreadable_config_file_is_named(tmp_path, text, words):
    file = tmp_path / "given.yaml"
    file.write_bytes(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_config(str(file), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", BASES)
@pytest.mark.parametrize("kind", ["mappings", "lists", "a circle"])
def test_exploding_aliases_are_rejected(tmp_path, kind, way):
    """Twelve lines that expand to 9 ** 12 values."""
    nested = "{%s}" if kind == "mappings" else "[%s]"
    lines = ["SEED: &a0 " + nested % ("k: 1" if kind == "mappings" else "1")]
    for i in range(12):
        keys = [f"k{j}: " if kind == "mappings" else "" for j in range(9)]
        lines.append(f"N{i}: &a{i + 1} " + nested % ", ".join(f"{key}*a{i}" for key in keys))
    text = "SEED: &a [*a]" if kind == "a circle" else "\n".join(lines)
    write(tmp_path, "")
    (tmp_path / "attack.yaml").write_text(text)
    file = tmp_path / "attack.yaml"
    if BASES[way]:
        file = tmp_path / "given.yaml"
        file.write_text(f"{BASES[way]}\nSEED: 3")
    with pytest.raises(UsageError, match=r"attack\.yaml has more than 10000 values"):
        load_config(str(file), [])


def test_aliases_are_allowed(tmp_path):
    file = tmp_path / "given.yaml"
    file.write_text("SOLVER: {MAX_ITER: &n 7}\nSEMI: {BURN_IN_ITERS: *n}")
    assert load_config(str(file), []).SEMI.BURN_IN_ITERS == 7
