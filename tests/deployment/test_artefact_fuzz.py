"""Artefacts that somebody has made with care: nothing but an ArtefactError comes out, and nothing of them is run."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment_nets import SmallNet, make_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ghostify.deployment import load
from ghostify.deployment.manifest import _digest, sha256
from ghostify.errors import ArtefactError

FILES = ("plan.json", "weights.safetensors")
BASE = make_net(seed=5)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What runs code, starts programs or reaches the network, as Python's audit events name it.
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)
MEMORY = Path("/proc/self/statm")  # Linux alone
seen: list[str] = []
watching = False


def watch(event: str, arguments: object) -> None:
    if watching and event in FORBIDDEN:
        seen.append(event)


sys.addaudithook(watch)  # it cannot be taken off again, hence the flag


@contextmanager
def confined(spare: int = 2**30) -> Iterator[None]:
    """At most so many bytes more than now, and a record of all code that is run."""
    global watching
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if MEMORY.exists():
        used = int(MEMORY.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, limits[1]))
    watching = True
    try:
        yield
    finally:
        watching = False
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not seen


def restored(scratch: Path, intact: Path) -> Path:
    return Path(shutil.copytree(intact, scratch, dirs_exist_ok=True))


def survives(folder: Path) -> nn.Module | None:
    """The model, or None if it was refused; any other error is a failure of the test."""
    with confined():
        try:
            return load(folder, base=BASE)
        except ArtefactError as error:
            told = str(error)
    assert str(folder) in told
    return None


PLACE = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.just(0)),
    st.tuples(st.just("insert"), PLACE, st.integers(0, 255)),
    st.tuples(st.just("blank"), PLACE, st.integers(1, 64)),
)


def damaged(data: bytearray, kind: str, place: float, number: int) -> bytearray:
    where = int(place * len(data))
    if kind == "flip" and data:
        data[where] ^= 1 << number
    elif kind == "cut":
        del data[where:]
    elif kind == "insert":
        data.insert(where, number)
    elif kind == "blank":
        data[where : where + number] = bytes(min(number, len(data) - where))
    return data


@FUZZ
@given(file=st.sampled_from(FILES), damages=st.lists(DAMAGE, min_size=1, max_size=4))
def test_several_damages_at_once(intact: Path, scratch: Path, file: str, damages: list[tuple[str, float, int]]) -> None:
    before = (intact / file).read_bytes()
    data = bytearray(before)
    for kind, place, number in damages:
        data = damaged(data, kind, place, number)
    (restored(scratch, intact) / file).write_bytes(data)
    assert (survives(scratch) is None) or bytes(data) == before or file == "plan.json"


NESTED: list[Any] = []
for _ in range(150):  # as deep as the parser goes
    NESTED = [NESTED]
HOSTILE = st.sampled_from(
    [
        None, True, -1, 0, 2**31, 2**63, 2**64, 10**300, 10**5000, 1e308, 0.5, -0.0, "", "NaN", "1e999",
        "../../../etc/passwd", "__class__", "os.system", "\x00", "é" * 1000, "x" * 100_000, [], {}, [[]], NESTED,
        {"a": NESTED}, [0] * 10_000, [2**40, 2**40],
    ]
)  # fmt: skip


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document is."""
    yield prefix
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(part, (*prefix, key))


def dumped(document: Any) -> str:
    # Python itself refuses to write whole numbers of more than 4,300 digits.
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document)
    finally:
        sys.set_int_max_str_digits(before)


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """With the checksum that belongs to it, as somebody would make who knows the format."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return {**document, "sha256": _digest(document.get("content"))}
    finally:
        sys.set_int_max_str_digits(before)


@FUZZ
@given(place=st.integers(0, 10**6), value=HOSTILE, remove=st.booleans())
def test_a_hostile_value_anywhere_in_the_plan(
    intact: Path, scratch: Path, place: int, value: Any, remove: bool
) -> None:
    document = json.loads((intact / "plan.json").read_text())
    found = [path for path in paths(document) if path]
    *path, last = found[place % len(found)]
    where = document
    for key in path:
        where = where[key]
    if remove and isinstance(where, dict):
        del where[last]
    else:
        where[last] = value
    (restored(scratch, intact) / "plan.json").write_text(dumped(signed(document)))
    model = survives(scratch)
    # Words that explain a decision may be any; then it is the model that was stored.
    assert model is None or isinstance(model, SmallNet)


TEXTS = {
    "nan": lambda text: text.replace('"ratio": 2.0', '"ratio": NaN'),
    "infinity": lambda text: text.replace('"ratio": 2.0', '"ratio": 1e999'),
    "many digits": lambda text: text.replace('"ratio": 2.0', f'"ratio": {"9" * 5000}'),
    "many digits of a count": lambda text: text.replace('"macs": ', '"macs": ' + "9" * 5000),
    "deep": lambda text: text.replace('"ratio": 2.0', '"ratio": ' + "[" * 50_000 + "]" * 50_000),
    "deep object": lambda text: '{"content": ' * 50_000 + "1" + "}" * 50_000,
    "twice the same key": lambda text: text.replace('"weights_bytes":', '"weights_bytes": 1, "weights_bytes":'),
    "twice, the other way": lambda text: text.replace('"format":', '"format": "zip", "format":'),
    "utf-16": lambda text: text.encode("utf-16").decode("latin-1"),
    "byte order mark": lambda text: "\ufeff" + text,
    "lone surrogate": lambda text: text.replace('"ratio": 2.0', '"ratio": "\\ud800"'),
    "comment": lambda text: "// hello\n" + text,
    "second document": lambda text: text + text,
}


@pytest.mark.parametrize("case", TEXTS)
def test_json_that_readers_take_in_different_ways(case: str, intact: Path, scratch: Path) -> None:
    text = (intact / "plan.json").read_text()
    changed = TEXTS[case](text)
    assert changed != text
    (restored(scratch, intact) / "plan.json").write_bytes(changed.encode("latin-1" if case == "utf-16" else "utf-8"))
    model = survives(scratch)
    assert model is None or case.startswith("twice")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [5], "data_offsets": [0, 20], **changes}


def header(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS: dict[str, bytes] = {
    "length of all memory": struct.pack("<Q", 2**63) + b"{}",
    "length of more than the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\x80\x05K\x01",
    "deep": struct.pack("<Q", 4000) + b"[" * 4000,
    "not all of the file": header({"head.bias": entry()}),
    "huge shape": header({"head.bias": entry(shape=[2**40, 2**40])}),
    "shape that overflows": header({"head.bias": entry(shape=[2**63, 2**63, 4])}),
    "offsets of a terabyte": header({"head.bias": entry(shape=[2**38], data_offsets=[0, 2**40])}),
    "offsets backwards": header({"head.bias": entry(data_offsets=[20, 0])}),
    "negative offsets": header({"head.bias": entry(data_offsets=[-20, 0])}),
    "unknown type": header({"head.bias": entry(dtype="OBJECT")}),
    "a shape of text": header({"head.bias": entry(shape="5")}),
    "a number of many digits": header({"head.bias": entry(shape=[10**4000])}),
    "no entry": header({"head.bias": None}),
}


def with_header(folder: Path, head: bytes) -> Path:
    """The weights behind another header, with the size and checksum that belong to it: only its reader is left."""
    file = folder / "weights.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    data = head + data[8 + length :]
    file.write_bytes(data)
    document = json.loads((folder / "plan.json").read_text())
    document["content"].update(weights_bytes=len(data), weights_sha256=sha256(data))
    (folder / "plan.json").write_text(dumped(signed(document)))
    return folder


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_of_the_weights(case: str, intact: Path, scratch: Path) -> None:
    folder = with_header(restored(scratch, intact), HEADERS[case])
    with confined(), pytest.raises(ArtefactError, match="cannot be read as safetensors"):
        load(folder, base=BASE)


KEYS = st.sampled_from(["head.bias", "dtype", "shape", "data_offsets", "__metadata__"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


@FUZZ
@given(value=ANY_JSON)
def test_any_header_of_the_weights(intact: Path, scratch: Path, value: Any) -> None:
    assert survives(with_header(restored(scratch, intact), header(value))) is None


@pytest.mark.parametrize(
    "base",
    [nn.Identity(), nn.Sequential(nn.Conv2d(3, 8, 3)), make_net(width=4), make_net(classes=6), nn.Linear(2, 2)],
    ids=lambda base: type(base).__name__,
)
def test_another_base_is_refused_whatever_it_is(base: nn.Module, intact: Path) -> None:
    with confined(), pytest.raises(ArtefactError, match="another model"):
        load(intact, base=base)


@pytest.mark.parametrize("version", [-1, 0, 2, 10**30, 1.5, "1", None, [1]])
def test_another_version_of_the_format_is_refused(version: object, intact: Path, scratch: Path) -> None:
    folder = restored(scratch, intact)
    document = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(dumped({**document, "version": version}))
    assert survives(folder) is None


def test_the_watch_sees_what_it_is_to_see() -> None:
    import pickle

    with pytest.raises(AssertionError), confined():
        pickle.loads(pickle.dumps(SmallNet))
    seen.clear()


@pytest.mark.skipif(not MEMORY.exists(), reason="the memory in use is known on Linux alone")
def test_the_confinement_holds() -> None:
    with confined(2**28), pytest.raises((RuntimeError, MemoryError)):
        torch.empty(2**30)
