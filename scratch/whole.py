import os, sys, time, statistics, collections, functools, gc
import torch, fivefold
from fivefold.benchmark import decode, machine
from fivefold.models import graph
sys.path.insert(0,'benchmarks')
import steps_gpu
T0=time.time()
dev=torch.device('cuda')
rate=machine.copy_rate(dev); model=decode.build('llama-3-8b',dev)
print('copy',rate,torch.cuda.get_device_name(),flush=True)
for c in [('kivi(bits=2)',4096,1),('kivi(bits=2)',131072,1),('kivi(bits=2)',32768,69),('full()',131072,1),('kivi(bits=4)',131072,1)]:
    try: row=steps_gpu.case(model,*c,rate)
    except torch.OutOfMemoryError as e: row={'error':str(e)[:80],'case':c}
    print({k: round(x,3) if isinstance(x,float) else x for k,x in row.items() if k not in('bytes','cache_bytes','tokens_s')}, round(time.time()-T0,1), flush=True)
gc.collect(); torch.cuda.empty_cache()
from fivefold.engine.session import Session
from fivefold.attention.tables import DeviceTables
from fivefold.store.bank import Bank
from fivefold.models import forward as Fw
from fivefold.engine import session as S
with torch.inference_mode():
    cache=decode.filled(model,'kivi(bits=2)',4096,1,True); t=torch.ones(1,1,dtype=torch.long,device=dev)
    for _ in range(5): model(t,past_key_values=cache)
    D=collections.defaultdict(list)
    def wrap(cls,name):
        f=getattr(cls,name); raw=cls.__dict__.get(name) if isinstance(cls,type) else None
        @functools.wraps(f)
        def g(*a,**k):
            t0=time.perf_counter()
            try: return f(*a,**k)
            finally: D[f'{getattr(cls,"__name__",cls)}.{name}'].append(time.perf_counter()-t0)
        setattr(cls,name,staticmethod(g) if isinstance(raw,staticmethod) else g)
    for kl,ns in ((graph.Step,['__call__','_step','why_not','_same','_replay']),(Session,['begin','include','admit','_open','why_not_fused','commit','advance']),(DeviceTables,['update','sync','_fill','fit','prepare']),(Bank,['open','begin','rows_of','advance','at'])):
        for n in ns: wrap(kl,n)
    wrap(Fw,'signature'); wrap(Fw,'decoder_config'); wrap(S,'tables_of'); wrap(torch.Tensor,'copy_'); wrap(torch.Tensor,'fill_'); wrap(torch.Tensor,'clone'); wrap(torch.cuda.CUDAGraph,'replay'); wrap(torch.cuda.Event,'record'); wrap(torch.cuda.Event,'synchronize')
    D.clear()
    for _ in range(100):
        torch.cuda.synchronize(); t0=time.perf_counter(); o=model(t,past_key_values=cache).logits; D['model()'].append(time.perf_counter()-t0); t=o[:,-1:].argmax(-1); D['argmax'].append(time.perf_counter()-t0)
    print('host us:', ', '.join(f'{k} {sorted(v)[len(v)//2]*1e6:.0f}x{len(v)/100:.0f}' for k,v in sorted(D.items(),key=lambda kv:-sorted(kv[1])[len(kv[1])//2]*len(kv[1]))),flush=True)
