"""`minimind` on a machine with little free memory: python -m tests.support.little_memory BYTES …"""

import sys

from minimind.cli.main import main
from minimind.inference import capacity

if __name__ == "__main__":
    free = int(sys.argv.pop(1))
    capacity.free_bytes = lambda device: free
    main()
