"""A Sphinx extension: comments beside arguments (docments) below each docstring, and headings named as by Jupyter."""

import inspect
import re
from collections import _tuplegetter

from fastcore.docments import docments


def comments_of(obj):
    "Comment beside each argument; those of a dataclass stand beside the fields of the classes that it is made of."
    if hasattr(obj, "_fields"):  # a NamedTuple
        return dict(re.findall(r"^ {4}(\w+):[^#\n]*# *(.+)$", inspect.getsource(obj), re.MULTILINE))
    found = docments(obj)
    for base in obj.__mro__[1:] if inspect.isclass(obj) else ():
        if base.__module__.partition(".")[0] == "smlstm":
            found = {name: text or docments(base).get(name) for name, text in found.items()}
    return found


def add_arguments(app, what, name, obj, options, lines):
    "Append a list of the arguments of a function, method or class that have a comment."
    if what not in ("function", "method", "class"):
        return
    try:
        comments = comments_of(obj)
    except Exception:  # builtins have no source
        return
    rows = [(argument, " ".join(text.split())) for argument, text in comments.items() if text]
    for argument, text in rows:
        field = "returns" if argument == "return" else f"param {argument}"
        lines += ["" if (argument, text) == rows[0] else None, f":{field}: {text}"]
    lines[:] = [line for line in lines if line is not None]


def skip_fields(app, what, name, obj, skip, options):
    "Fields of a NamedTuple are among the arguments of its class."
    return True if isinstance(obj, _tuplegetter) else None


def describe_figures(app, doctree):
    "Figures of cells get the text before them in the place of a file name, for those who do not see them."
    from docutils import nodes

    text = ""
    for node in doctree.findall(lambda node: isinstance(node, (nodes.paragraph, nodes.image))):
        if isinstance(node, nodes.paragraph):
            text = " ".join(node.astext().split())
        elif not node.get("alt"):
            node["alt"] = text[:300]


def anchor(title):
    "The anchor of a heading as Jupyter and GitHub's notebooks have it."
    return title.replace(" ", "-")


def setup(app):
    app.connect("autodoc-process-docstring", add_arguments)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", describe_figures)
    return {"parallel_read_safe": True}
