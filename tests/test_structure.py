"""The walls of the project: layers that point downwards, no import cycle, one idea a file, short functions."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The layout's layers from top to bottom (docs: design). A module may import from its own layer and from those below.
LAYERS = ['cli', 'evaluation_verbs', 'plan_verb', 'data_verbs', 'ablations', 'configurables', 'plan', 'runs', 'pretrained',
          'description', 'evaluation', 'ranking', 'inference', 'training', 'models', 'tasks', 'text', 'data', 'gguf_files',
          'provenance', 'outputs', 'storage', 'html_page', 'printable', 'errors', 'quiet_tensorflow']
GIN_READERS = {'cli', 'configurables'}  # layers that may know of gin; all others take plain arguments
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80  # without the docstring

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _sources(*folders: str) -> dict[str, str]:
  """Relative path -> text of each Python file."""
  paths = [path for folder in folders for path in sorted((ROOT / folder).rglob('*.py'))]
  return {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in paths}


def _module_name(path: str) -> str:
  return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def _imports(source: str, known: set[str]) -> set[str]:
  """The project's modules that a source imports, at whatever place in it."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative import: name the package in full'
      names |= {f'{node.module}.{alias.name}' if f'{node.module}.{alias.name}' in known else node.module
                for alias in node.names}
  return {name for name in names if name.split('.')[0] == 'calrec_jax'}


def _graph(sources: dict[str, str]) -> dict[str, set[str]]:
  known = {_module_name(path) for path in sources}
  return {_module_name(path): _imports(source, known) for path, source in sources.items()}


def _layer(module: str) -> int:
  name = (module.split('.') + [''])[1]
  assert name in LAYERS, f'{module}: its layer is not known; add it to LAYERS at its height'
  return LAYERS.index(name)


def upward_imports(sources: dict[str, str]) -> list[str]:
  return [f'{module} -> {target}' for module, targets in _graph(sources).items() if module != 'calrec_jax'
          for target in sorted(targets - {'calrec_jax'}) if _layer(target) < _layer(module)]


def import_cycle(sources: dict[str, str]) -> list[str]:
  """A cycle of the import graph, as a path that ends where it began; [] if there is none."""
  graph, finished = _graph(sources), set()

  def visit(module: str, path: list[str]) -> list[str]:
    if module in path:
      return path[path.index(module):] + [module]
    if module in finished:
      return []
    cycles = (visit(target, [*path, module]) for target in sorted(graph.get(module, ())))
    cycle = next(filter(None, cycles), [])
    finished.add(module)
    return cycle

  return next(filter(None, (visit(module, []) for module in sorted(graph))), [])


def gin_below_the_edge(sources: dict[str, str]) -> list[str]:
  found = []
  for path, source in sources.items():
    imported = {alias.name.split('.')[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {(node.module or '').split('.')[0] for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.ImportFrom)}
    if 'gin' in imported and _module_name(path).split('.')[1] not in GIN_READERS:
      found.append(path)
  return found


def without_an_idea(sources: dict[str, str]) -> list[str]:
  """Files without a docstring whose first line is a sentence."""
  first = {path: (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0] for path, source in sources.items()}
  return [path for path, line in first.items() if not re.search(r'\w.*[.:]$', line)]


def long_files(sources: dict[str, str]) -> list[str]:
  return [path for path, source in sources.items() if source.count('\n') > MAX_FILE_LINES]


def long_functions(sources: dict[str, str]) -> list[str]:
  found = []
  for path, source in sources.items():
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, FUNCTIONS):
        docstring = ast.get_docstring(node, clean=False)
        length = node.end_lineno - node.lineno + 1 - (docstring.count('\n') + 1 if docstring else 0)
        if length > MAX_FUNCTION_LINES:
          found.append(f'{path}: {node.name} has {length} lines')
  return found


def _public_functions(tree: ast.Module):
  """(name, node) of module-level functions and of methods of module-level classes, those with a leading _ left out."""
  for node in tree.body:
    if isinstance(node, FUNCTIONS) and not node.name.startswith('_'):
      yield node.name, node
    elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
      yield from ((f'{node.name}.{method.name}', method) for method in node.body
                  if isinstance(method, FUNCTIONS) and not method.name.startswith('_'))


def _returns_a_value(function: ast.AST) -> bool:
  """Whether it returns or yields anything, functions inside it left out."""
  for node in ast.iter_child_nodes(function):
    if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
      continue
    if isinstance(node, (ast.Yield, ast.YieldFrom)) or (isinstance(node, ast.Return) and node.value is not None):
      return True
    if _returns_a_value(node):
      return True
  return False


def untyped(sources: dict[str, str]) -> list[str]:
  """Public functions with an argument, or a result, that has no type."""
  found = []
  for path, source in sources.items():
    for name, node in _public_functions(ast.parse(source)):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ('self', 'cls')]
      if bare or (node.returns is None and _returns_a_value(node)):
        found.append(f'{path}: {name}({", ".join(bare)})')
  return found


CHECKS = [upward_imports, import_cycle, gin_below_the_edge, without_an_idea, long_files, long_functions, untyped]

# For each check a pair of small files that break what it guards, and nothing else.
MUTANTS = {
    upward_imports: {'calrec_jax/data/a.py': '"""A."""\ndef f():\n  from calrec_jax.ranking import bm25\n',
                     'calrec_jax/ranking/bm25.py': '"""B."""\n'},
    import_cycle: {'calrec_jax/data/a.py': '"""A."""\nimport calrec_jax.data.b\n',
                   'calrec_jax/data/b.py': '"""B."""\nfrom calrec_jax.data import a\n'},
    gin_below_the_edge: {'calrec_jax/data/a.py': '"""A."""\nimport gin.config\n'},
    without_an_idea: {'calrec_jax/data/a.py': 'x = 1\n'},
    long_files: {'calrec_jax/data/a.py': '"""A."""\n' + 'x = 1\n' * MAX_FILE_LINES},
    long_functions: {'calrec_jax/data/a.py': '"""A."""\ndef f() -> None:\n' + '  x = 1\n' * MAX_FUNCTION_LINES},
    untyped: {'calrec_jax/data/a.py': '"""A."""\nclass C:\n  def f(self, x: int):\n    return x\n'},
}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_its_walls(check):
  assert check(_sources('calrec_jax')) == []


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('broken', CHECKS, ids=lambda check: check.__name__)
def test_each_check_finds_its_own_mutant_alone(check, broken):
  assert bool(check(MUTANTS[broken])) == (check is broken)


def test_test_functions_are_short_too():
  assert long_functions(_sources('tests')) == []


def test_test_files_have_unique_names():
  names = [pathlib.Path(path).name for path in _sources('tests') if path.rpartition('/')[2].startswith('test_')]
  assert sorted(names) == sorted(set(names))


def test_every_folder_is_a_package():
  folders = {path.parent for path in (ROOT / 'calrec_jax').rglob('*.py')}
  assert [folder for folder in sorted(folders) if not (folder / '__init__.py').exists()] == []
  assert list((ROOT / 'gin').rglob('*.py')) == []


def test_gin_files_open_with_what_they_are_for():
  files = sorted((ROOT / 'gin').rglob('*.gin'))
  assert files
  texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in files}
  assert [path for path, text in texts.items() if not re.match(r'# \w.*[.:]\n', text)] == []
  headers = {path: re.match(r'(#.*\n)*', text)[0] for path, text in texts.items()}
  assert [path for path, header in headers.items() if 'Required:' not in header
          or 'Commonly overridden:' not in header] == []
