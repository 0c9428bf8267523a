"""Taking what was found out: to safetensors, to Orbax, and as a script that needs no gradhpo."""

from gradhpo.export.orbax_folder import save_orbax
from gradhpo.export.safetensors_file import save_safetensors
from gradhpo.export.script import write_script

__all__ = ["save_orbax", "save_safetensors", "write_script"]
