"""``python -m eval.tasks.video_qa msvd <folder>``: puts the questions where lmms-eval's own command line finds them."""

import argparse
from pathlib import Path

from eval.errors import UserError, report
from eval.tasks.video_qa.data import FOLDERS, default_file, rows, write

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=sorted(FOLDERS))
parser.add_argument("folder", type=Path)
arguments = parser.parse_args()
try:
    print(write(rows(arguments.folder), default_file(arguments.name)))
except (ValueError, OSError) as error:
    raise SystemExit(report(UserError(str(error)))) from error
