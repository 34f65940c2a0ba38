# SPDX-License-Identifier: Apache-2.0
import pathlib
import re

from setuptools import find_packages, setup

VERSION = re.search(r"__version__ = '(.+)'", pathlib.Path('jaxsd/__init__.py').read_text())[1]
CORE = '''jax>=0.10.2,<0.12  flax>=0.12.8,<0.13  optax>=0.2.8,<0.3  orbax-checkpoint>=0.12.8,<0.13
    grain>=0.2.18,<0.3  tensorflow-datasets>=4.9.10,<5  importlib_resources  array_record>=0.8.3
    sentencepiece>=0.2.1  ml-collections>=1.1,<2  absl-py>=2  numpy>=2.1,<3  safetensors>=0.5
    rich>=13  jiwer>=3.1,<5  sacrebleu>=2.4,<3  matplotlib>=3.9,<4  tensorboardX>=2.6'''.split()
AUDIO = 'soundfile>=0.13  librosa>=0.11,<0.12  scipy>=1.15  scikit-learn>=1.6,<2'.split()
DEMO = AUDIO + 'espeakng-loader>=0.2.4  pocketsphinx>=5.0.4,<6'.split()
STABLEHLO, GGUF = ['flatbuffers>=24'], ['gguf>=0.19,<1']
EXTRAS = {
    'stablehlo': STABLEHLO,         # export for other jax processes
    'gguf': GGUF,                   # export for llama.cpp
    'onnx': 'onnx>=1.20.1  onnx-ir>=0.2.1  onnxruntime>=1.24.1'.split(),   # and jax2onnx by hand
    'audio': AUDIO,                 # codecs, and reading and writing sound
    'demo': DEMO,                   # the synthesised corpus (eSpeak NG is GPL-3.0) and its judge
    'test': DEMO + STABLEHLO + GGUF + ('pytest>=9  pytest-xdist>=3.6,<4  hypothesis>=6.100  '
                                           'jsonschema>=4.21,<5  ruff>=0.9').split(),
    'mimi': AUDIO + 'torch>=2.4  transformers>=4.57'.split(),
    'cuda13': ['jax[cuda13]>=0.10.2,<0.12'],
    'tpu': ['jax[tpu]>=0.10.2,<0.12'],
    'wandb': ['wandb>=0.19'],               # jaxsd report --wandb
    'plan': ['jax[tpu]>=0.10.2,<0.12'],     # the compiler for TPUs, which runs anywhere
}

setup(name='jaxsd', version=VERSION, license='Apache-2.0', python_requires='>=3.11',
      description='Sharded, reproducible pretraining of spoken dialogue models in JAX.',
      packages=find_packages(include=['jaxsd*', 'data_pipelines*']),
      package_data={'jaxsd': ['*.html', 'report/*.css', 'plan/gpus/*.txtpb']},
      install_requires=CORE, extras_require=EXTRAS,
      entry_points={'console_scripts': ['jaxsd = jaxsd.cli:main']})
