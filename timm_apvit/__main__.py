"""``python -m timm_apvit``, and ``timm-apvit``."""

import sys


def main() -> int:
    """Run the command line, whose modules take a second or two to load; see `timm_apvit.cli.main`."""
    try:
        from timm_apvit.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; nothing was written\n')
        return 130


if __name__ == '__main__':
    sys.exit(main())
