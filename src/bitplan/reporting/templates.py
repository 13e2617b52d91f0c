"""The templates' environment: the filters that all of them use, and what is escaped when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitplan.budget import human
from bitplan.reporting import wording

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(**options: Any) -> Environment:
    """Templates with the words of `wording`; whatever ends in .html.j2 is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("bitplan"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        **options,
    )
    made.filters |= {
        "size": human,
        "sig": wording.sig,
        "percent": wording.percent,
        "engine": wording.engine,
    }
    made.globals |= {"shown": wording.measurement}
    return made
