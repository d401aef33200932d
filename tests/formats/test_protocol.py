"""What all formats promise, whatever they store."""

from dataclasses import replace

import pytest
import torch

from df11.formats import Format, FormatError, get_format
from tests.helpers import normal, same_bits

FORMATS = ("bf16", "dfloat11", "tiled")


@pytest.fixture(params=FORMATS)
def layout(request: pytest.FixtureRequest) -> Format:
    found = get_format(request.param)
    assert found.name == request.param
    return found


def test_tensors_come_back_whole_and_as_a_stream(layout: Format) -> None:
    """Odd shapes, one symbol, tensors that are no rows in memory; also none at all, and pieces that end anywhere."""
    tensors = [normal(48, 300), torch.zeros(40, 130).bfloat16(), normal(3, 5, 7).permute(2, 0, 1), normal(0, 4), normal()]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    unit = layout.encode(lambda: flat.split(777), [tuple(tensor.shape) for tensor in tensors])
    back = layout.decode(unit)
    assert [tensor.shape for tensor in back] == [tensor.shape for tensor in tensors]
    assert all(map(same_bits, back, tensors))
    assert same_bits(torch.cat(list(layout.stream(unit))), flat)
    assert layout.decode(layout.encode(list, [])) == []


def test_shapes_that_are_not_those_of_the_weights_are_refused(layout: Format) -> None:
    with pytest.raises(ValueError, match=r"10 weights where the shapes ask for 12"):
        layout.encode(lambda: [normal(10)], [(3, 4)])
    unit = layout.encode(lambda: [normal(64 * 300)], [(64, 300)])
    parts = {"matrices": (replace(unit.matrices[0], shape=(65, 300)),)} if layout.name == "tiled" else {"shapes": ((65, 300),)}
    for read in (layout.decode, lambda wrong: list(layout.stream(wrong)), layout.check):
        with pytest.raises(FormatError):
            read(replace(unit, **parts))


@pytest.mark.parametrize("name", FORMATS[1:])
def test_weights_that_are_not_bf16_on_the_cpu_are_refused(name: str) -> None:
    for wrong, error, told in (
        (torch.zeros(16, 128), TypeError, r"got torch\.float32: only bf16 weights are compressed"),
        (torch.zeros(16, 128).half(), TypeError, r"got torch\.float16"),
        (torch.zeros(16, 128, dtype=torch.bfloat16, device="meta"), ValueError, r"one on meta: move it with \.cpu\(\)"),
    ):
        with pytest.raises(error, match=told):
            get_format(name).encode(lambda wrong=wrong: [wrong.reshape(-1)], [(16, 128)])


def test_other_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no format 'df11': there are bf16, dfloat11, tiled"):
        get_format("df11")
    for limit in (7, 33):
        with pytest.raises(ValueError, match=f"max_code_length={limit}: the layout takes 8 to 32"):
            get_format("dfloat11", max_code_length=limit)
