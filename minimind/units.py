"""Numbers, sizes and amounts of memory as text."""


def format_number(value: object) -> str:
    """Format a value for people: 1,234,567 and 0.1235; floats keep four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def format_size(num_bytes: float | None) -> str:
    """Format the size of a file: 950 bytes, 12.3 kB, 4.5 MB, 1.25 GB (1 kB = 1,000 bytes).

    None is an unknown size.
    """
    if num_bytes is None:
        return "unknown"
    if num_bytes < 1000:
        return f"{num_bytes:.0f} byte" + "s" * (num_bytes != 1)
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:,.1f} kB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"


def format_memory(num_bytes: int) -> str:
    """Format an amount of memory: 12 KB, 800 MB, 1.25 GB (1 KB = 1,024 bytes)."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / (1 << 10):,.0f} KB"
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.0f} MB"
    return f"{num_bytes / (1 << 30):.2f} GB"
