"""Print the file to give to ms-swift's `--external_plugins`."""

from pathlib import Path

print(Path(__file__).with_name("dil_swift_plugin.py"))
