"""What several sections check alike."""


def not_positive(section: str, config: object, names: tuple[str, ...]) -> list[str]:
    """A problem for every field that is not above 0."""
    values = [(name, getattr(config, name)) for name in names]
    return [f"{section}.{name} is {value}, expected more than 0" for name, value in values if not value > 0]
