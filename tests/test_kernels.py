"""Which of two twins is called."""

import inspect
import subprocess
import sys

import pytest
import torch

from detcore.kernels import accelerated, disable, enabled


def fast(x, *, shift=0):
    return "fast", x, shift


@pytest.fixture
def joined():
    @accelerated(fast, when=lambda x, *, shift=0: x > 0)
    def plain(x, *, shift=0):
        """Says which it is."""
        return "plain", x, shift

    return plain


def test_accelerated_calls_the_fast_form_where_it_applies(joined):
    assert joined(1, shift=2) == ("fast", 1, 2)
    assert joined(-1, shift=2) == ("plain", -1, 2)


def test_accelerated_shows_the_plain_function_to_readers(joined):
    assert joined.__doc__ == "Says which it is."
    assert "plain" in inspect.getsource(joined)
    assert joined.__wrapped__(1) == ("plain", 1, 0)


def test_disable_turns_fast_forms_off_and_back_on(joined):
    with disable():
        assert not enabled()
        assert joined(1)[0] == "plain"
        with disable():
            assert joined(1)[0] == "plain"
        assert joined(1)[0] == "plain"
    assert enabled()
    assert joined(1)[0] == "fast"


def test_disable_ends_with_an_error_inside(joined):
    with pytest.raises(KeyError), disable():
        raise KeyError("inside")
    assert joined(1)[0] == "fast"


def test_a_compiler_sees_the_plain_function():
    @accelerated(lambda x: x - 1, when=lambda x: True)
    def plain(x):
        return x + 1

    seen = torch.compile(plain, backend="eager", fullgraph=True)
    assert seen(torch.zeros(1)).item() == 1
    assert plain(torch.zeros(1)).item() == -1


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), (None, True)])
def test_environment_switches_a_whole_process(value, on, monkeypatch):
    if value is None:
        monkeypatch.delenv("DETCORE_KERNELS", raising=False)
    else:
        monkeypatch.setenv("DETCORE_KERNELS", value)
    code = "from detcore.kernels import enabled; print(enabled())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(on)
