"""Packaging: every fact is read from `settings.ini`, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]
extras = {name.removesuffix("_requirements"): wanted.split(" ") for name, wanted in facts.items() if name.endswith("_requirements")}

setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=facts["git_url"],
    author=facts["author"],
    author_email=facts["author_email"],
    keywords=facts["keywords"],
    license="Apache-2.0",
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=["smlstm", "smlstm.*"]),
    install_requires=facts["requirements"].split(" "),
    extras_require=extras,
    zip_safe=False,
)
