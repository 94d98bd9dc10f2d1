"""Packaging: every fact is read from `settings.ini`, which nbdev reads too."""

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]
extras = {
    name.removesuffix("_requirements"): wanted.split(" ")
    for name, wanted in facts.items()
    if name.endswith("_requirements")
}
extras["dev"] += extras["notebooks"]  # whoever develops runs the notebooks


def with_whole_links(page):
    """A page whose relative links work outside the repository; pictures are linked as files."""
    page = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{facts['git_url']}/raw/{facts['branch']}/", page)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\1{facts['git_url']}/blob/{facts['branch']}/", page)


class build_with_notebook(build_py):
    """A wheel also holds the notebook of the whole flow, `nbs/train.ipynb`, as `smlstm/train.ipynb`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(here / "nbs" / "train.ipynb", Path(self.build_lib) / "smlstm")


setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=with_whole_links((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    url=facts["git_url"],
    author=facts["author"],
    author_email=facts["author_email"],
    keywords=facts["keywords"],
    license="Apache-2.0",
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=["smlstm", "smlstm.*"]),
    cmdclass={"build_py": build_with_notebook},
    package_data={"smlstm": ["py.typed"]},
    entry_points={"console_scripts": ["smlstm = smlstm.using.commands:main"]},
    install_requires=facts["requirements"].split(" "),
    extras_require=extras,
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        *[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
