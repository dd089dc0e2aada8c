"""List the tasks that `eval.run` knows, with their options."""

from eval.tasks import TASKS

for task in TASKS.values():
    options = [f"task.{key}={'|'.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in task.options.items()]
    print(f"{task.name:16} {task.size:7,} questions  {'; '.join([task.title, *options])}")
