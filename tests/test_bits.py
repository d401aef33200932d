import numpy as np
import pytest
import torch

from df11 import bits

ALL = np.arange(1 << 16, dtype=np.uint16)


def test_split_and_merge_are_inverse_on_all_patterns() -> None:
    exponent, sign_mantissa = bits.split(ALL)
    assert np.array_equal(bits.merge(exponent, sign_mantissa), ALL)


def test_fields_are_those_of_ieee() -> None:
    exponent, sign_mantissa = bits.split(bits.to_bits(torch.tensor([1.0, -2.0, 1.5, -0.0], dtype=torch.bfloat16)))
    assert exponent.tolist() == [127, 128, 127, 0]
    assert sign_mantissa.tolist() == [0, 0x80, 0x40, 0x80]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 1001])
def test_histogram_counts_exponents(n: int) -> None:
    some = np.random.default_rng(n).integers(0, 1 << 16, n, dtype=np.uint16)
    assert np.array_equal(bits.histogram(some), np.bincount(bits.split(some)[0], minlength=256))


def test_field_histograms() -> None:
    fields = bits.field_histograms(np.array([0x3F80, 0xBF81, 0xBF81], np.uint16))
    assert fields["sign"].tolist() == [1, 2]
    assert fields["exponent"][127] == 3 and fields["exponent"].sum() == 3
    assert fields["mantissa"][:2].tolist() == [1, 2]


def test_tensor_round_trip_shares_memory_and_keeps_nan_payloads() -> None:
    tensor = bits.from_bits(ALL.copy(), (256, 256))
    again = bits.to_bits(tensor)
    assert np.array_equal(again, ALL)
    assert again.ctypes.data == tensor.data_ptr()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        bits.to_bits(torch.zeros(2))
