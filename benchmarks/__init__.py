"""Measurements that compare two ways in one run; each prints one JSON object."""
