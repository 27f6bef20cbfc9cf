"""The rules of the house (docs/architecture.md): layers, one of each, no side effects, annotations, plain words.

Sources are read with `ast`, so that nothing escapes by standing inside a function. A rule is a generator of what breaks
it; `test_the_house_keeps` checks all of them.
"""

import ast
import graphlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "guided_diffusion"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted(PACKAGE.rglob("*.py"))}  # fmt: skip
BELOW_CLI = {name: path for name, path in MODULES.items() if not name.startswith("guided_diffusion.cli")}

SOURCES = [*MODULES.values(), *SCRIPTS, *sorted((ROOT / "datasets").glob("*.py"))]

# From the ground floor up. A module imports from its own layer and those before it.
LAYERS = (
    ("errors",),
    ("registry",),
    ("options",),
    ("unet", "ddpm", "nn", "losses", "gaussian_diffusion", "respace", "resample", "script_util", "dist_util",
     "references", "image_datasets", "fp16_util", "logger", "runtime", "caching"),
    ("codec", "target", "flow"),
    ("sddm", "manifold", "moo", "solvers", "energy", "baselines"),
    ("checkpoint", "upscaler"),
    ("methods", "presets"),
    ("run",),
    ("translator", "evaluation", "training", "train_util", "diffusers_pipeline"),
    ("web",),
    ("cli",),
)  # fmt: skip

# energy.vgg takes the path of a file, and asks the reader of files only then.
UPWARDS = {("guided_diffusion.energy", "guided_diffusion.checkpoint")}

# Names of guided-diffusion whose behaviour is kept: what they do by the rules' exception.
ARGPARSE_ALLOWED = {
    ("guided_diffusion.script_util", name) for name in ("add_dict_to_argparser", "args_to_dict", "str2bool")
}
PRINT_ALLOWED = {"guided_diffusion.logger"}  # its purpose is to print tables

# Not the variables of a style sheet, var(--ink) and --ink:#222.
FLAG = re.compile(r"(?<![\w-])(?<!var\()--[a-zA-Z][\w-]*(?![\w-]|:\s*[#\d])")


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(node):
    """A dotted name such as `sys.exit`, or "" where the node is none."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(path):
    """Module-level functions and the methods of module-level classes: (qualified name, node)."""
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}", inner


def owner(path, line):
    """The name of the module-level function or method that holds a line, or ""."""
    return next((name for name, node in functions(path) if node.lineno <= line <= node.end_lineno), "")


def imports(module, path):
    """What a module of the package imports, as absolute names: (name, line). Imports inside functions count."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield (full if full in MODULES else source), node.lineno


# ---- rule 1: below cli/ nobody knows a flag, argparse, stderr or an exit status -------------------------------------


def no_flag_stands_below_cli():
    strings = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for name, path in BELOW_CLI.items():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type in strings:
                yield from (f"{name}:{token.start[0]}: {flag}" for flag in FLAG.findall(token.string))


def nothing_below_cli_parses_flags_prints_or_exits():
    for name, path in BELOW_CLI.items():
        for node in ast.walk(tree(path)):
            call = isinstance(node, ast.Call)
            word = name_of(node.func) if call else name_of(node)
            exits = word in ("sys.exit", "exit", "quit", "SystemExit")
            prints = word in ("sys.stderr", "sys.stdout") or (call and word == "print")
            parses = word.startswith("argparse.") and (name, owner(path, node.lineno)) not in ARGPARSE_ALLOWED
            if exits or parses or (prints and name not in PRINT_ALLOWED):
                yield f"{name}:{node.lineno}: {word}"


# ---- rule 3: options are frozen dataclasses -------------------------------------------------------------------------


def options_are_frozen_dataclasses():
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                values = [item.value for item in node.body if isinstance(item, ast.AnnAssign)]
                calls = {name_of(value.func).split(".")[-1] for value in values if isinstance(value, ast.Call)}
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if "option" in calls and not any("dataclass" in d and "frozen=True" in d for d in decorators):
                    yield f"{path.relative_to(ROOT)}: {node.name}"


# ---- rule 5: one writer per file ------------------------------------------------------------------------------------

WRITERS = {"write_json", "write_text", "write_bytes", "write_atomically", "open", "dump"}


def run_json_has_one_writer():
    """And its name stands once, in run.record."""
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and name_of(node.func).split(".")[-1] in WRITERS:
                speaks = re.search(r"run\.json|\b(run_)?record\.NAME\b", ast.unparse(node))
            else:
                speaks = isinstance(node, ast.Constant) and node.value == "run.json"
            if speaks and name != "guided_diffusion.run.record":
                yield f"{name}:{node.lineno}"


# ---- rule 6: importing has no side effect ---------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, threading
import torch, numpy, PIL.Image  # what these do is theirs
def state():
    return {
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": [logging.root.level, len(logging.root.handlers), len(logging.getLogger("sddm").handlers)],
        "environment": [dict(os.environ), list(sys.path)],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled()],
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
    }
before, failed = state(), {}
def run():
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed[name] = repr(error)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(json.dumps([failed, {key: value for key, value in state().items() if value != before[key]}]))
"""


def test_every_module_can_be_imported_in_a_thread_without_side_effect():
    command = [sys.executable, "-c", IMPORT_ALL, *MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed, changed = json.loads(done.stdout.splitlines()[-1])
    # The modules that need an optional package say which.
    assert "pip install diffusers" in failed.pop("guided_diffusion.diffusers_pipeline", "pip install diffusers")
    demo = "pip install -r requirements-demo.txt"
    assert demo in failed.pop("guided_diffusion.web.page", demo)
    assert (failed, changed) == ({}, {}) and done.stderr == ""


# ---- rule 7: one of each --------------------------------------------------------------------------------------------

ONE_OF_EACH = {
    "dtype table": (r"""["']?(fp32|float32|bf16)["']?\s*[:=]\s*torch\.(float32|bfloat16)""", {"runtime.py"}),
    "device picker": (r"torch\.backends\.mps\.is_available|torch\.device\(.*cuda.*is_available", {"runtime.py"}),
    "first line of an error": (r"splitlines\(\)\s*(\[0\]|or\b)", {"errors.py"}),
    # checkpoint/loading.py renames a folder, checkpoint/remote.py a file that was downloaded and read.
    "atomic write": (
        r"\bos\.(replace|rename)\(|\.replace\(path\)",
        {"run/files.py", "checkpoint/loading.py", "checkpoint/remote.py"},
    ),
    "JSON read": (r"\bjson\.load\((?!archive\.)|json\.loads\([^)]*read", {"run/files.py"}),
    "image to tensor and back": (r"[*/] ?127\.5", {"image_datasets.py"}),
    "option parser": (r"\bArgumentParser\b", {"cli/flags.py", "script_util.py"}),
    "listing of images": (r"\bos\.scandir\(|\bos\.walk\(", {"references.py", "run/files.py"}),
}


def there_is_one_of_each():
    for what, (pattern, allowed) in ONE_OF_EACH.items():
        for path in SOURCES:
            name = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if name not in allowed and re.search(pattern, line):
                    yield f"{what}: {name}:{number}: {line.strip()}"


# ---- rule 8: imports go down ----------------------------------------------------------------------------------------


def layer(module):
    """The layer of a module of the package, by the first part of its name; the package itself is the top.

    run.files needs nothing but errors: whoever writes a file uses it.
    """
    if module == "guided_diffusion.run.files":
        return 1
    part = module.removeprefix("guided_diffusion").strip(".").partition(".")[0]
    return next((k for k, names in enumerate(LAYERS) if part in names), len(LAYERS))


def imports_go_down():
    for name, path in MODULES.items():
        if layer(name) == len(LAYERS) and name != "guided_diffusion":
            yield f"{name} has no layer"
        for target, line in imports(name, path):
            up = target.startswith("guided_diffusion.") and layer(target) > layer(name)
            if up and (name, target) not in UPWARDS:
                yield f"{name}:{line} imports {target}"


def imports_make_no_circle():
    graph = {name: set() for name in MODULES}
    for name, path in MODULES.items():
        for target, _ in imports(name, path):
            # A package's own __init__ gathers what its modules offer.
            if target in MODULES and target not in (name, "guided_diffusion") and not name.startswith(f"{target}."):
                graph[name].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield " -> ".join(error.args[1])


def test_the_paper_stands_alone():
    code = "import sys, guided_diffusion.sddm, guided_diffusion.baselines; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"mpi4py", "torchvision", "scipy", "PIL"} & set(done.stdout.split())  # slow, or may be missing
    loaded = [name for name in done.stdout.split() if name.startswith("guided_diffusion.")]
    above = {"checkpoint", "run", "evaluation", "cli", "training", "options", "methods"}
    assert loaded and not [name for name in loaded if name.split(".")[1] in above]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_show_their_wiring_on_one_screen(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    assert "command.start()" in lines, "an interrupt while torch is imported is one line"
    assert any(re.match(r"    command\.run\(", line) for line in lines), "signals and exit statuses are cli.main's"


# ---- annotations and prose ------------------------------------------------------------------------------------------


def public_functions_are_annotated():
    for name, path in {**MODULES, "resizer": ROOT / "resizer" / "__init__.py"}.items():
        for function, node in functions(path):
            if any(part.startswith("_") and part not in ("__init__", "__call__") for part in function.split(".")):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            static = any(name_of(decorator) == "staticmethod" for decorator in node.decorator_list)
            arguments = arguments[1:] if "." in function and not static else arguments
            missing = [argument.arg for argument in arguments if argument.annotation is None]
            if missing or node.returns is None:
                yield f"{name}.{function}: {', '.join(missing) or 'what it returns'}"


def docstrings_do_not_begin_with_what():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in [*MODULES.values(), *SCRIPTS]:
        for node in ast.walk(tree(path)):
            if isinstance(node, kinds) and (ast.get_docstring(node) or "").startswith("What "):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


RULES = (
    no_flag_stands_below_cli, nothing_below_cli_parses_flags_prints_or_exits, options_are_frozen_dataclasses,
    run_json_has_one_writer, there_is_one_of_each, imports_go_down, imports_make_no_circle,
    public_functions_are_annotated, docstrings_do_not_begin_with_what,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    broken = list(rule())
    assert not broken, "\n".join(["", *broken])


# ---- one version ----------------------------------------------------------------------------------------------------


def test_the_version_stands_once():
    import guided_diffusion

    version = guided_diffusion.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    others = [ROOT / "pyproject.toml", ROOT / "setup.py", *MODULES.values()]
    holders = [path for path in others if re.search(rf"""["']{re.escape(version)}["']""", path.read_text("utf-8"))]
    assert holders == [PACKAGE / "__init__.py"]
