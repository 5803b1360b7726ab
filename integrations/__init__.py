"""Plugins for training frameworks. Each subpackage needs its framework; importing this package needs none."""
