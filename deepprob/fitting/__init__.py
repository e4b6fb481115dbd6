"""Fitting: what routines that take gradient steps share."""
