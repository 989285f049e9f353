"""Timeout after which a silent worker is replaced, and the environment variable that changes it. Imports no library.

Ray Train reads the variable for training workers, stages/mapping/heartbeat.py for workers that map parts.
"""

HEARTBEAT_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
HEARTBEAT_TIMEOUT_S = 60  # default; a live process may be slow, and killing it costs its part
