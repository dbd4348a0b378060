from ._version import __version__ as __version__
from .configuration import GengramConfig
from .modeling_gengram import *
