"""How Sphinx shows the notebooks: `.ci/site` prepares their folder and calls it."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "smlstm"
copyright = "2026 onwards, The smlstm developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx_pages"]
root_doc = "index"
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # what is shown was committed
nb_merge_streams = True
nb_ipywidgets_js = {}  # the scripts of widgets would come from a network
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "sphinx_pages.anchor"
suppress_warnings = ["myst.header", "ref.term", "ref.ref", "mystnb.unknown_mime_type", "misc.highlighting_failure"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "smlstm"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_theme_options = {"source_repository": "https://github.com/smlstm/smlstm", "source_branch": "main"}
