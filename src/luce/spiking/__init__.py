"""Spiking networks from trained ones: read, calibrate, convert, simulate.

>>> import torch
>>> from luce import models
>>> network = models.build("binary:vgg_pool", classes=10, input_shape=(1, 8, 8), widths=[4, 8, 8])
>>> images = torch.rand(32, 1, 8, 8)
>>> chain = read(network.eval())
>>> spiking = convert(chain, Calibration(chain, [images]).scales(percentile=99.9))
>>> [tuple(moment.logits.shape) for moment in spiking.simulate(images, steps=2)]
[(32, 10), (32, 10)]
"""

from .calibration import Calibration, Percentiles, Scale
from .chain import Chain, Obstacle, obstacles, read
from .evaluate import Exit, Record, choose_exit, early_exit, record
from .network import Moment, SpikingNetwork, convert, integrate_and_fire

__all__ = [
    "Calibration",
    "Chain",
    "Exit",
    "Moment",
    "Obstacle",
    "Percentiles",
    "Record",
    "Scale",
    "SpikingNetwork",
    "choose_exit",
    "convert",
    "early_exit",
    "integrate_and_fire",
    "obstacles",
    "read",
    "record",
]
