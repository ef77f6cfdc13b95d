"""What every page has: the style, the head with its links, sections, and how a refusal is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nicegui import ui

from litfreeze_board.places import Root

LINKS = {"New run": "/", "Runs": "/runs", "Chat": "/chat"}


def shared() -> None:
    """The style of all pages."""
    style = Path(__file__).parents[1] / "board.css"
    ui.add_css(style.read_text(encoding="utf-8"), shared=True)


@contextmanager
def page(root: Root, here: str) -> Iterator[None]:
    """A page, with the link `here` marked in its head."""
    with ui.element("main").classes("lf-page"):
        with ui.element("nav").classes("lf-head").props('aria-label="Pages"'):
            ui.html("<b>litfreeze</b>", sanitize=False, tag="span")
            for name, target in LINKS.items():
                link = ui.link(name, target)
                if name == here:
                    link.props("aria-current=page")
            ui.label(str(root.path)).classes("lf-root")
        yield


@contextmanager
def section(title: str) -> Iterator[None]:
    """A section with a heading."""
    with ui.element("section").classes("lf-section"):
        if title:
            ui.html(title, sanitize=True, tag="h2")
        yield


def code(text: str = "", kind: str = "lf-code") -> ui.label:
    """Text as it is, in a fixed width."""
    return ui.label(text).classes(kind if kind == "lf-code" else f"lf-code {kind}")


def refused(text: str = "") -> ui.label:
    """Where a refusal is told; nothing while there is none."""
    label = ui.label(text).classes("lf-refused").props("role=alert")
    label.bind_visibility_from(label, "text", backward=bool)
    return label
