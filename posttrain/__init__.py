"""Post-training for Audio Flamingo Next. A Ray instance started here stays on loopback."""

import os

if "RAY_ADDRESS" not in os.environ:
    # Ray reads this when it is imported; without it, it listens on the machine's outer address
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
