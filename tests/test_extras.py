from __future__ import annotations

from pathlib import Path

import pytest

from ghostify.errors import MissingExtraError
from ghostify.extras import require


def test_a_module_that_is_there_is_returned() -> None:
    assert require("json.decoder", extra="none").JSONDecoder


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.part"])
def test_a_missing_package_names_the_extra(name: str) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'ghostify\[report\]'") as caught:
        require(name, extra="report")
    assert isinstance(caught.value, ImportError)


def test_a_package_that_is_there_but_broken_keeps_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import something_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs") as caught:
        require("half_installed", extra="report")
    assert not isinstance(caught.value, MissingExtraError)
