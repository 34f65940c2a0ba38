# SPDX-License-Identifier: Apache-2.0
"""Makes jobset.schema.json, what a JobSet may hold, from the definition that its project ships.

    python tests/golden/make_jobset_schema.py jobset.x-k8s.io_jobsets.yaml \\
        github.com/kubernetes-sigs/jobset COMMIT

The definition lies at config/components/crd/bases/ of that repository (Apache-2.0). Left out are
its prose, the rules that only a cluster evaluates (x-kubernetes-validations), and the parts of a
pod that launch/gke.yaml has no use for (UNUSED), which are therefore refused. As in a cluster that
validates strictly, a field that the definition does not name is an error.
"""

import json
import pathlib
import sys

UNUSED = ('affinity', 'ephemeralContainers', 'initContainers', 'volumes')
KEPT = ('type', 'required', 'enum', 'pattern', 'minimum', 'maximum', 'minLength', 'maxLength',
        'minItems', 'maxItems', 'minProperties', 'maxProperties')


def plain(node: dict) -> dict:
    """An OpenAPI v3 schema of Kubernetes as JSON Schema that refuses unknown fields."""
    out = {k: node[k] for k in KEPT if k in node}
    if node.get('x-kubernetes-int-or-string'):
        out['type'] = ['integer', 'string']
    if 'properties' in node:
        out['properties'] = {k: plain(v) for k, v in node['properties'].items() if k not in UNUSED}
        out['additionalProperties'] = False
    elif isinstance(node.get('additionalProperties'), dict):
        out['additionalProperties'] = plain(node['additionalProperties'])
    if 'items' in node:
        out['items'] = plain(node['items'])
    return out


def main(definition: str, project: str, commit: str) -> None:
    import yaml
    found = yaml.safe_load(pathlib.Path(definition).read_text())
    [version] = found['spec']['versions']
    schema = plain(version['schema']['openAPIV3Schema'])
    schema['properties']['apiVersion'] = {'const': f'{found["spec"]["group"]}/{version["name"]}'}
    schema['properties']['kind'] = {'const': found['spec']['names']['kind']}
    schema['required'] = ['apiVersion', 'kind', 'metadata', 'spec']
    name = dict(type='string', pattern='^[a-z0-9]([-a-z0-9]*[a-z0-9])?$', maxLength=63)
    labels = dict(type='object', additionalProperties={'type': 'string'})
    for meta in (schema['properties'],
                 schema['properties']['spec']['properties']['replicatedJobs']['items'][
                     'properties']['template']['properties']['spec']['properties']['template'][
                     'properties']):      # the definition leaves these to the API server
        meta['metadata'] = dict(type='object', additionalProperties=False, properties=dict(
            name=name, namespace=name, labels=labels, annotations=labels))
    schema['properties']['metadata']['required'] = ['name']
    head = {'$schema': 'https://json-schema.org/draft/2020-12/schema',
            '$comment': f'From {project} at {commit}, Copyright The Kubernetes Authors, '
                        'Apache-2.0; made by make_jobset_schema.py'}
    out = pathlib.Path(__file__).with_name('jobset.schema.json')
    out.write_text(json.dumps(head | schema, separators=(',', ':'), sort_keys=True) + '\n')
    print(f'{out}: {out.stat().st_size:,} bytes')


if __name__ == '__main__':
    main(*sys.argv[1:])
