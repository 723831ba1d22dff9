"""What a benchmark says of an error that ends one measurement and not the run."""


def in_one_line(error: Exception, most: int = 300) -> str:
    """The error's type and the first line of its message, of at most so many characters."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:most]}"
