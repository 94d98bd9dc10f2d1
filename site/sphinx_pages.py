"""A Sphinx extension: comments beside arguments (docments) below each docstring, and headings named as by Jupyter."""

import inspect

from fastcore.docments import docments


def comments_of(obj):
    "Comment beside each argument; those of a dataclass stand beside the fields of the classes that it is made of."
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
    except Exception:  # builtins and named tuples have no source
        return
    rows = [(argument, " ".join(text.split())) for argument, text in comments.items() if text]
    for argument, text in rows:
        field = "returns" if argument == "return" else f"param {argument}"
        lines += ["" if (argument, text) == rows[0] else None, f":{field}: {text}"]
    lines[:] = [line for line in lines if line is not None]


def anchor(title):
    "The anchor of a heading as Jupyter and GitHub's notebooks have it."
    return title.replace(" ", "-")


def setup(app):
    app.connect("autodoc-process-docstring", add_arguments)
    return {"parallel_read_safe": True}
