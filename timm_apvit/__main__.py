"""``python -m timm_apvit``, and ``timm-apvit``."""

import atexit
import os
import sys


def main() -> int:
    """Run the command line, whose modules take a second or two to load; see `timm_apvit.cli.main`."""
    try:
        from timm_apvit.cli.main import main as run

        status = run()
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; nothing was written\n')
        status = 130
    if os.environ.get('WORLD_SIZE', '') not in ('', '1') and sys.argv[1:2] != ['run']:
        # A thread of torch's process group that still holds a tensor would abort an interpreter that ends (torch 2.14).
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return status


if __name__ == '__main__':
    sys.exit(main())
