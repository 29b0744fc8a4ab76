"""Engines that sample and score; each is a module of its own, with its own dependencies."""
