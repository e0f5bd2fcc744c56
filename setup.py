"""Packaging: all figures stand in settings.ini; run notebooks and job scripts travel inside the package."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]  # 3.11 runs the tests, 3.13 was installed and trained a run; the others resolve, see RELEASE.md
RUN_NOTEBOOKS = ["train", "precompute", "evaluate", "audit", "copying", "search", "explore"]


class BuildWithNotebooks(build_py):
    """Copy the run notebooks and the job scripts into the package that is built."""

    def run(self):
        super().run()
        if self.editable_mode:  # they are found where they lie
            return
        target = Path(self.build_lib) / "difflit"
        (target / "notebooks").mkdir(parents=True, exist_ok=True)
        for name in RUN_NOTEBOOKS:
            shutil.copy(HERE / "nbs" / f"{name}.ipynb", target / "notebooks" / f"{name}.ipynb")
        shutil.copytree(HERE / "hpc", target / "hpc", dirs_exist_ok=True)


extras = {name.removeprefix("extra_"): value.split() for name, value in cfg.items() if name.startswith("extra_")}
extras["dev"] = cfg["dev_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    packages=find_packages(include=["difflit", "difflit.*"]),
    package_data={"difflit": ["assets/*", "assets/tiny/*", "assets/tiny/*/*", "py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": [cfg["console_scripts"]]},
    cmdclass={"build_py": BuildWithNotebooks},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: {version}" for version in ("3", "3 :: Only", *PYTHONS)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md", "Source": cfg["git_url"]},
    zip_safe=False,
)
