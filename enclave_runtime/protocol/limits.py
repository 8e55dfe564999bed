"""How many connections an enclave serves; each is served by a thread of its own.

The server holds these limits, and the Gramine manifest counts threads by them. Holds no secret.
"""

from __future__ import annotations

MAX_STRANGERS = 32  # connections of one port that have not proved themselves yet
CLIENT_CONNECTIONS = 8  # of an owner, who needs one for each process that it connects from
HOST_CONNECTIONS = 64  # of a host, which needs one for each request at a time
# Devices of a mesh, which all wait in the enclave at once. Below the host's connections: whoever
# aborts the run meanwhile needs one too, and a second run has its own.
MAX_WORKERS = HOST_CONNECTIONS // 2

# With all of them open: the client's port, and two of the host, for its processes on the enclave's
# machine and on others, who share the host's connections.
CONNECTIONS = 3 * MAX_STRANGERS + CLIENT_CONNECTIONS + HOST_CONNECTIONS
