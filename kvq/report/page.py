"""The look of every page that kvq writes: one file, no network access, no scripts, light and dark, narrow and wide."""

from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvq import __version__


def render(template: str, *, brand: str, title: str, **values: Any) -> str:
    """A page of ``kvq/report/templates``. brand: what kind of page; title: its heading. Texts are escaped."""
    css = Markup(resources.files("kvq.report.templates").joinpath("page.css").read_text())
    page = _environment().get_template(template)
    return page.render(css=css, version=__version__, brand=brand, title=title, **values) + "\n"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kvq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
