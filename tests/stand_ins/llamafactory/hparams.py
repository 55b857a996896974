import json
import sys
from pathlib import Path


def read_args(args=None):
    return json.loads(Path(sys.argv[1]).read_text()) if sys.argv[1:] else []
