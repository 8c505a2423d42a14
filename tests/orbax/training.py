"""Series of steps: Orbax's own managers read what Touchdown's Checkpointer wrote, and write what it reads; policies on histories.

Every verb works on a folder with an `index.json`; what it finds goes into JSON files beside it.
"""

import datetime
import json
import math
import pathlib

import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint import v1
from orbax.checkpoint._src.checkpoint_managers import preservation_policy as keep
from orbax.checkpoint._src.checkpoint_managers import save_decision_policy as save
from orbax.checkpoint._src.path import step as step_lib

training = v1.training


def names(facts):
    return step_lib.standard_name_format(
        step_prefix=facts['prefix'], step_format_fixed_length=facts['digits'] or None)


def plain(value):
    """NaN and infinities as strings, as Touchdown shows them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {'nan': 'NaN', 'inf': 'Infinity', '-inf': '-Infinity'}[str(value)]
    return value


def read(out):
    """What both managers find in every root."""
    folder = pathlib.Path(out)
    index = json.loads((folder / 'index.json').read_text())
    for facts in index['roots']:
        root = folder / facts['name']
        found = {'v1': read_v1(root, facts), 'v0': read_v0(root, facts)}
        (folder / (facts['name'] + '.json')).write_text(json.dumps(found))
    return {'roots': len(index['roots'])}


def read_v1(root, facts):
    with training.Checkpointer(root, step_name_format=names(facts)) as manager:
        steps = {}
        for checkpoint in manager.checkpoints:
            tree = manager.load(checkpoint.step, checkpointable_name=facts['item'])
            metadata = manager.metadata(checkpoint.step)
            items = manager.load_checkpointables(checkpoint.step)
            steps[str(checkpoint.step)] = {
                'w': np.asarray(tree['w']).tolist(), 'metrics': plain(checkpoint.metrics),
                'custom': dict(metadata.custom_metadata or {}), 'commit_ns': metadata.commit_timestamp_nsecs,
                'init_ns': metadata.init_timestamp_nsecs,
                'items': sorted(items), 'json': items.get(facts.get('json'))}
        return {'latest': manager.latest.step, 'steps': steps,
                'root': dict(manager.root_metadata().custom_metadata or {})}


def read_v0(root, facts):
    options = v0.CheckpointManagerOptions(
        step_name_format=names(facts), read_only=True, best_fn=lambda metrics: metrics['loss'], best_mode='min')
    items = (facts['item'],) + ((facts['json'],) if facts.get('json') else ())
    with v0.CheckpointManager(root, options=options, item_names=items) as manager:
        steps = {}
        for step in manager.all_steps():
            restored = manager.restore(step, args=v0.args.Composite(**{facts['item']: v0.args.PyTreeRestore()}))
            steps[str(step)] = {'w': np.asarray(restored[facts['item']]['w']).tolist(),
                                'metrics': plain(manager.metrics(step))}
            if facts.get('json'):
                args = v0.args.Composite(**{facts['json']: v0.args.JsonRestore()})
                steps[str(step)]['json'] = manager.restore(step, args=args)[facts['json']]
        return {'latest': manager.latest_step(), 'best': manager.best_step() if facts['metrics'] else None,
                'steps': steps, 'root': dict(manager.metadata().custom_metadata or {})}


def tree(step):
    return {'w': np.full((500,), step, np.int32), 'step': step}


LOSSES = {1: 0.5, 2: 0.125, 3: float('nan'), 5: 0.25, 8: 0.125, 9: float('inf')}


def write(out):
    """Roots of both managers, with metrics, custom metadata, prefixes, several items, and steps that policies removed."""
    folder = pathlib.Path(out)
    roots = []
    for number, (prefix, digits) in enumerate([(None, None), ('ckpt', 6)]):
        facts = {'name': f'v1-{number}', 'prefix': prefix, 'digits': digits or 0, 'item': 'state', 'metrics': True,
                 'steps': [1, 2, 3, 5, 8, 9], 'root': {'run': number}, 'custom': True}
        with training.Checkpointer(
                folder / facts['name'], step_name_format=names(facts), custom_metadata=facts['root'],
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1)) as manager:
            for step in facts['steps']:
                assert manager.save(step, tree(step), metrics={'loss': LOSSES[step]}, custom_metadata={'epoch': step})
        roots.append(facts)
        facts = {'name': f'v0-{number}', 'prefix': prefix, 'digits': digits or 0, 'item': 'state', 'metrics': True,
                 'steps': [2, 8, 9], 'root': {'exp': [number]}, 'custom': False}
        options = v0.CheckpointManagerOptions(
            step_name_format=names(facts),
            preservation_policy=keep.AnyPreservationPolicy([
                keep.BestN(get_metric_fn=lambda metrics: metrics['loss'], reverse=True, n=2,
                           keep_checkpoints_without_metrics=False), keep.LatestN(1)]),
            best_fn=lambda metrics: metrics['loss'], best_mode='min')
        with v0.CheckpointManager(folder / facts['name'], options=options, metadata=facts['root']) as manager:
            for step in [1, 2, 5, 8, 9]:
                manager.save(step, metrics={'loss': LOSSES[step]}, args=v0.args.Composite(
                    state=v0.args.StandardSave(tree(step)), config=v0.args.JsonSave({'lr': 0.5})))
        roots.append(facts)
    (folder / 'index.json').write_text(json.dumps({'roots': roots}))
    return {'roots': len(roots)}


def go_on(out):
    """Both managers save one more step into every root, and keep two."""
    folder = pathlib.Path(out)
    for facts in json.loads((folder / 'index.json').read_text())['roots']:
        root, last = folder / facts['name'], facts['last']
        with training.Checkpointer(root, step_name_format=names(facts),
                                   preservation_policy=keep.LatestN(2)) as manager:
            assert manager.save(last + 1, tree(last + 1), metrics={'loss': 1.0})
        options = v0.CheckpointManagerOptions(step_name_format=names(facts), max_to_keep=2)
        with v0.CheckpointManager(root, options=options) as manager:
            assert manager.save(last + 2, args=v0.args.Composite(state=v0.args.StandardSave(tree(last + 2))))
    return {}


class Info:
    def __init__(self, step, time, metrics):
        self.step, self.metrics = step, metrics
        self.time = datetime.datetime.fromtimestamp(time, tz=datetime.timezone.utc)


def preservation(policy):
    kind, value = policy['kind'], policy
    if kind == 'all':
        return keep.PreserveAll()
    if kind == 'latest':
        return keep.LatestN(value['count'])
    if kind == 'every_steps':
        return keep.EveryNSteps(value['interval'], exact_interval=value['exact'], max_to_keep=value['max'])
    if kind == 'closest':
        return keep.EveryNStepsClosest(value['interval'], max_to_keep=value['max'])
    if kind == 'every_seconds':
        return keep.EveryNSeconds(value['seconds'])
    if kind == 'steps':
        return keep.CustomSteps(value['steps'])
    if kind == 'best':
        return keep.BestN(get_metric_fn=lambda metrics: metrics['m'], reverse=value['smallest'], n=value['count'],
                          keep_checkpoints_without_metrics=value['keep_without'])
    if kind == 'latest_duration':
        return keep.LatestDuration(datetime.timedelta(seconds=value['seconds']))
    return keep.AnyPreservationPolicy([preservation(one) for one in value['policies']])


def saving(policy):
    kind = policy['kind']
    if kind == 'interval':
        return save.FixedIntervalPolicy(policy['interval'])
    if kind == 'steps':
        return save.SpecificStepsPolicy(set(policy['steps']))
    if kind == 'continuous':
        return save.ContinuousCheckpointingPolicy(minimum_interval_secs=policy['seconds'])
    if kind == 'initial':
        return save.InitialSavePolicy()
    if kind == 'signal':
        return save.PreemptionCheckpointingPolicy()
    return save.AnySavePolicy([saving(one) for one in policy['policies']])


def policies(out):
    """What Orbax's policies decide about the histories that are given."""
    folder = pathlib.Path(out)
    found = []
    for case in json.loads((folder / 'cases.json').read_text()):
        history = [Info(step['step'], step['time'], None if step['m'] is None else {'m': step['m']})
                   for step in case['history']]
        kept = [list(map(bool, preservation(policy).should_preserve(history, context=keep.PreservationContext())))
                for policy in case['preservation']]
        context = save.DecisionContext(
            is_saving_in_progress=case['saving'], reached_preemption=case['signal'],
            multiprocessing_options=v0.options.MultiprocessingOptions())
        now = Info(case['step'], case['now'], None)
        saved = [bool(saving(policy).should_save(now, history, context=context)) for policy in case['save']]
        found.append({'kept': kept, 'saved': saved})
    (folder / 'decisions.json').write_text(json.dumps(found))
    return {'cases': len(found)}
