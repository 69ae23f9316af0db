"""``python -m timm_apvit``."""

import sys

from timm_apvit.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
