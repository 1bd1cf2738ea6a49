# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Stock anomalib knows Pedenet once the package is installed, and no other Python notices it.

The wheel is built once and installed into temporary environments, which see the dependencies of the running
environment through a path file. Every check runs in a fresh interpreter; importing anomalib takes seconds, so checks
that can share one do.
"""

import json
import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "anomalib-pedenet"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]

pytest.importorskip("pip", reason="builds and installs the package by pip")
pytest.importorskip("hatchling", reason="builds the package by hatchling")


class Environment:
    """A temporary virtual environment.

    Args:
        folder: Where to create it.
        dependencies: Whether it sees what is installed in the running environment.
    """

    def __init__(self, folder: Path, *, dependencies: bool) -> None:
        builder = venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt")
        builder.create(folder)
        self.python = builder.ensure_directories(folder).env_exe
        self.site_packages = Path(self.run("import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
        if dependencies:
            seen = Path(str(distribution("anomalib").locate_file(""))).resolve()
            (self.site_packages / "dependencies.pth").write_text(f"{seen}\n")

    def run(
        self,
        code: str,
        *arguments: str,
        cwd: Path | None = None,
        first_on_path: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a fresh interpreter, away from the checkout, and require that it succeeds."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
        if first_on_path is not None:
            env["PYTHONPATH"] = str(first_on_path)
        command = [self.python, *arguments, "-c", textwrap.dedent(code)] if code else [self.python, *arguments]
        cwd = cwd or Path(self.python).parent
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments: str) -> None:
        """Run the running environment's pip for this one."""
        command = [*PIP, "--python", self.python, *arguments]
        done = subprocess.run(command, cwd=self.site_packages, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def listing(self) -> set[str]:
        """Return every file and folder in site-packages."""
        return {path.relative_to(self.site_packages).as_posix() for path in self.site_packages.rglob("*")}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (built,) = folder.glob("*.whl")
    return built


def install_options(kind: str, wheel: Path) -> list[str]:
    if kind == "editable":
        return ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    return ["install", "--no-deps", str(wheel)]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the dependencies and the package."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "env", dependencies=True)
    environment.pip(*install_options("wheel", wheel))
    return environment


@pytest.fixture(scope="session")
def installed_editable(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the dependencies and the checkout."""
    environment = Environment(tmp_path_factory.mktemp("editable") / "env", dependencies=True)
    environment.pip(*install_options("editable", wheel))
    return environment


@pytest.fixture(scope="session")
def installed_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the package and nothing else, not even anomalib."""
    environment = Environment(tmp_path_factory.mktemp("alone") / "env", dependencies=False)
    environment.pip("install", "--no-deps", str(wheel))
    return environment


def fake_anomalib(folder: Path, models: str) -> Path:
    """Write an anomalib of another kind, with ``models`` as the code of its ``anomalib.models``."""
    package = folder / "anomalib" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text('__version__ = "0.7.0"\n')
    (package / "__init__.py").write_text(textwrap.dedent(models))
    return folder


def test_wheel_holds_the_package_and_the_startup_files_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        trigger = archive.read("anomalib_pedenet.pth").decode()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
        "_anomalib_pedenet_startup.py",
        "anomalib_pedenet",
        "anomalib_pedenet.pth",
        "anomalib_pedenet.start",
    }
    assert "anomalib_pedenet/py.typed" in names
    # Python runs only lines that start like this, and takes any other for a folder.
    assert all(line.startswith("import ") for line in trigger.splitlines())


@pytest.mark.parametrize("kind", ["installed", "installed_editable"])
def test_interpreter_start_imports_the_hook_only(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    code = """
        import sys
        print(*sys.modules)
        print(sum(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path))
    """
    bare = Environment(tmp_path / "env", dependencies=True).run(code).stdout.splitlines()
    hooked = request.getfixturevalue(kind).run(code).stdout.splitlines()
    assert set(hooked[0].split()) - set(bare[0].split()) == {"_anomalib_pedenet_startup"}
    assert (hooked[1], bare[1]) == ("1", "0")


@pytest.mark.parametrize("kind", ["installed", "installed_editable"])
def test_anomalib_knows_pedenet(request: pytest.FixtureRequest, kind: str) -> None:
    code = """
        import contextlib, io, sys, warnings
        warnings.filterwarnings("error", "anomalib-pedenet")

        from anomalib.models import Pedenet, get_model, image, list_models
        import anomalib.models

        assert Pedenet.__module__.startswith("anomalib_pedenet"), Pedenet
        assert image.Pedenet is Pedenet
        assert anomalib.models.__all__.count("Pedenet") == image.__all__.count("Pedenet") == 1
        assert {"pedenet", "padim"} <= list_models()
        assert type(get_model("pedenet")) is type(get_model("Pedenet")) is Pedenet
        for class_path in (
            "Pedenet",
            "anomalib.models.Pedenet",
            "anomalib.models.image.Pedenet",
            "anomalib_pedenet.Pedenet",
            "anomalib_pedenet.lightning_model.Pedenet",
        ):
            assert type(get_model({"class_path": class_path})) is Pedenet, class_path
        assert not any(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path)

        # Importing the package afterwards changes nothing.
        import anomalib_pedenet
        assert anomalib_pedenet.Pedenet is Pedenet
        assert anomalib.models.__all__.count("Pedenet") == 1

        # The command line: a configuration from each spelling, and the help.
        from anomalib.cli import AnomalibCLI

        def command_line(*arguments):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                try:
                    AnomalibCLI(args=["fit", *arguments], run=False)
                except SystemExit as stop:
                    assert not stop.code, (arguments, stop.code)
            return out.getvalue()

        data = ("--data", "Folder", "--data.name", "x", "--data.normal_dir", "y")
        for spelling in ("Pedenet", "anomalib.models.Pedenet", "anomalib_pedenet.Pedenet"):
            assert "Pedenet\\n" in command_line("--model", spelling, *data, "--print_config")
        assert "--model." in command_line("--model.help", "Pedenet")
        sys.argv = ["anomalib", "fit", "--help"]
        assert "anomalib_pedenet.Pedenet" in command_line("--help")
        print(anomalib_pedenet.__file__)
    """
    (file,) = request.getfixturevalue(kind).run(code).stdout.splitlines()
    assert Path(file).is_relative_to(ROOT) == (kind == "installed_editable")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the orders are tried in forks of one process")
def test_every_import_order(installed: Environment) -> None:
    # Each order starts from a process that has imported what is slow and none of the modules in question.
    code = """
        import os, sys, traceback, warnings
        import lightning.pytorch, torch, torchmetrics, torchvision  # noqa
        import cv2, pandas, sklearn, timm  # noqa
        warnings.filterwarnings("error", "anomalib-pedenet")
        assert not any(name.startswith("anomalib") for name in sys.modules)

        def check(first, hook):
            if not hook:  # as under python -S
                sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "anomalib_pedenet")]
            __import__(first)
            from anomalib.models import Pedenet, list_models
            import anomalib_pedenet
            assert Pedenet is anomalib_pedenet.Pedenet
            assert "pedenet" in list_models()

        ours = ["", ".lightning_model", ".torch_model", ".networks", ".scorers", ".host.registration"]
        orders = [("anomalib_pedenet" + name, hook) for name in ours for hook in (True, False)]
        orders += [
            ("anomalib" + name, True)
            for name in ("", ".models", ".models.components", ".models.image.padim", ".engine", ".cli", ".data",
                         ".data.dataclasses", ".metrics", ".pre_processing", ".post_processing", ".visualization",
                         ".deploy", ".callbacks", ".pipelines")
        ]
        failed = []
        for first, hook in orders:
            child = os.fork()
            if not child:
                try:
                    check(first, hook)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                failed.append((first, hook))
        assert not failed, failed
    """
    installed.run(code)


WORKER = """
    import multiprocessing
    import sys

    def names(queue):
        before = "anomalib_pedenet" in sys.modules
        from anomalib.models import list_models
        queue.put((before, "pedenet" in list_models()))

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=names, args=(queue,))
        process.start()
        print(*queue.get(timeout=300))
        process.join()
        print("anomalib" in sys.modules)
"""


@pytest.mark.parametrize("command", [["worker.py"], ["-m", "worker"]], ids=["script", "module"])
def test_spawned_worker_knows_pedenet(
    installed: Environment,
    command: list[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    done = installed.run("", *command, cwd=tmp_path)
    assert done.stdout.split() == ["False", "True", "False"]


def test_without_anomalib_nothing_happens(installed_alone: Environment) -> None:
    code = """
        import sys
        try:
            import anomalib.models
        except ModuleNotFoundError as error:
            print(error.name, "anomalib_pedenet" in sys.modules)
    """
    done = installed_alone.run(code, "-W", "error")
    assert done.stdout.split() == ["anomalib", "False"]
    assert not done.stderr


def test_package_out_of_reach_leaves_anomalib_alone(installed_alone: Environment, tmp_path: Path) -> None:
    # Tools that run a program from an archive read the start-up files, and take site-packages off the path later.
    fake_anomalib(tmp_path, "value = 1")
    code = f"""
        import sys
        sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry] + [{str(tmp_path)!r}]
        import anomalib.models
        print(anomalib.models.value)
    """
    done = installed_alone.run(code, "-W", "error")
    assert done.stdout.split() == ["1"]
    assert not done.stderr


@pytest.mark.parametrize("dependencies", [True, False], ids=["dependencies", "nothing else"])
def test_unsuitable_anomalib_is_a_warning(
    request: pytest.FixtureRequest,
    dependencies: bool,
    tmp_path: Path,
) -> None:
    # The fake comes first on the path, so that it hides any real anomalib; it has none of the classes Pedenet needs.
    environment: Environment = request.getfixturevalue("installed" if dependencies else "installed_alone")
    fake_anomalib(tmp_path / "fake", "value = 1")
    code = """
        import json, sys, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import anomalib.models
        ours = [w for w in caught if "anomalib-pedenet" in str(w.message)]
        print(json.dumps({
            "value": anomalib.models.value,
            "categories": [w.category.__name__ for w in ours],
            "messages": [str(w.message) for w in ours],
            "finders": sum(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path),
        }))
    """
    seen = json.loads(environment.run(code, first_on_path=tmp_path / "fake").stdout)
    assert seen["value"] == 1
    assert seen["categories"] == ["RuntimeWarning"]
    assert "does not know the model Pedenet" in seen["messages"][0]
    assert "Error: " in seen["messages"][0]
    assert "pip install --upgrade anomalib-pedenet anomalib" in seen["messages"][0]
    assert seen["finders"] == 0


def test_failed_import_of_anomalib_stays_what_it_is_and_can_be_repeated(
    installed_alone: Environment,
    tmp_path: Path,
) -> None:
    fake_anomalib(tmp_path, 'import sys\nif not hasattr(sys, "mended"): raise ImportError("no torch here")')
    code = """
        import sys, warnings
        warnings.simplefilter("error")
        try:
            import anomalib.models
        except ImportError as error:
            print(error)
        sys.mended = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import anomalib.models
        print(len(caught))
    """
    assert installed_alone.run(code, first_on_path=tmp_path).stdout.splitlines() == ["no torch here", "1"]


def test_namespace_package_in_place_of_anomalib_is_a_warning(installed_alone: Environment, tmp_path: Path) -> None:
    # What an interrupted uninstallation leaves: a folder without code, hence without a loader to wrap.
    (tmp_path / "anomalib" / "models").mkdir(parents=True)
    done = installed_alone.run("import anomalib.models; print(1)", first_on_path=tmp_path)
    assert done.stdout.split() == ["1"]
    assert "RuntimeWarning: anomalib-pedenet" in done.stderr


def test_tools_see_the_loader_unchanged(installed_alone: Environment, tmp_path: Path) -> None:
    fake_anomalib(tmp_path, "value = 1")
    code = """
        import importlib.util, inspect, warnings
        warnings.simplefilter("ignore")
        assert importlib.util.find_spec("anomalib.models").loader.get_source("anomalib.models") == "value = 1"
        import anomalib.models
        assert type(anomalib.models.__loader__).__name__ == "SourceFileLoader"
        assert "exec_module" not in vars(anomalib.models.__loader__)
        assert inspect.getsource(anomalib.models).strip() == "value = 1"
    """
    installed_alone.run(code, first_on_path=tmp_path)


def test_start_file_names_the_hook(installed_alone: Environment, tmp_path: Path) -> None:
    # What Python 3.15 does with a .start file; -S keeps this Python from reading the .pth file. It may do it twice.
    fake_anomalib(tmp_path, "value = 1")
    code = f"""
        import pathlib, pkgutil, sys, warnings
        site_packages = {str(installed_alone.site_packages)!r}
        sys.path.append(site_packages)
        assert not any(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path)
        (entry_point,) = pathlib.Path(site_packages, "anomalib_pedenet.start").read_text().splitlines()
        for _ in range(2):
            pkgutil.resolve_name(entry_point)()
        assert sum(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path) == 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import anomalib.models
        print(*[w.category.__name__ for w in caught])
    """
    assert installed_alone.run(code, "-S", first_on_path=tmp_path).stdout.split() == ["RuntimeWarning"]


@pytest.mark.parametrize("kind", ["wheel", "editable", "uncompiled"])
def test_uninstallation_leaves_nothing(kind: str, wheel: Path, tmp_path: Path) -> None:
    # An editable installation needs the build backend of the running environment.
    environment = Environment(tmp_path / "env", dependencies=kind == "editable")
    before = environment.listing()
    environment.pip(*install_options(kind, wheel), *(["--no-compile"] if kind == "uncompiled" else []))
    assert "anomalib_pedenet.pth" in environment.listing() - before

    # Use it, so that what Python writes while running is there too.
    fake_anomalib(tmp_path / "fake", "value = 1")
    environment.run("import anomalib.models", first_on_path=tmp_path / "fake")
    assert any("__pycache__" in name for name in environment.listing())

    environment.pip("uninstall", "--yes", NAME)
    assert environment.listing() == before
