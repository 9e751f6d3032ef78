"""What runs in this process is loaded before pytester looks at `sys.modules`: it takes away what it did not find there, and
numpy and pandas cannot be loaded twice; nor can numpy.fft, which scipy asks for when it is first used."""

import scipy.stats  # noqa: F401

import pgcheck.verdict_items  # noqa: F401
