"""Integer rounding: `ceil_div` and `round_up`."""


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b. b > 0."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return ceil_div(value, multiple) * multiple
