import itertools, json, os, sys, time, statistics, traceback
from concurrent.futures import ProcessPoolExecutor
import multiprocessing as mp
T0=time.time()
OUT=os.environ.get('OUT','/tmp')
H,I,V,D=4096,14336,128256,128
def grids():
    g=[]
    line={
      'heads':[(R,BK,W,late) for R in (2,4,8) for BK in (512,1024) for W in (2,4,8) for late in (True,False) if (late or BK==1024) and BK>=W*128],
      'o':[(R,BK,W,False) for R in (2,4,8,16) for BK in (512,1024,2048) for W in (2,4,8) if BK>=W*128 and R*BK/W<=4096],
      'down':[(R,BK,W,False) for R in (4,8,16) for BK in (512,1024,2048) for W in (2,4,8) if BK>=W*128 and R*BK/W<=4096],
      'gated':[(R,BK,W,late) for R in (2,4,8) for BK in (512,1024) for W in (2,4,8) for late in (True,False) if (late or BK==1024) and BK>=W*128],
      'head':[(R,BK,W,late) for R in (8,16) for BK in (512,1024) for W in (4,8) for late in (True,) if BK>=W*128],
    }
    for kind,vs in line.items():
        for v in vs: g.append((1,kind,*v[:3],1,v[3]))
    for count in (8,):
        for kind in ('heads','o','down','gated','head'):
            for R,BK,W,S in [(16,128,1,6),(16,256,2,4),(16,256,4,4),(16,512,4,3),(32,128,2,4),(32,256,4,3),(64,128,4,4),(64,64,4,6)]:
                if kind=='heads' and R>64: continue
                g.append((count,kind,R,BK,W,S,False))
    return g
def call(kind, count, s, lay, x, big, tiles, pdl):
    from fivefold.kernels.step import triton as K
    if kind=='heads': return K.heads(x, lay['qkv'], [None]*3, lay['n1'], s['turn'], s['pages'], tiles=tiles, pdl=pdl)[0]
    if kind=='o': return K.added(x, lay['o'], None, s['res'], tiles=tiles, pdl=pdl)
    if kind=='down': return K.added(big, lay['down'], None, s['res'], tiles=tiles, pdl=pdl)
    if kind=='gated': return K.gated(x, lay['gate'], lay['up'], [None]*2, lay['n2'], 'silu', tiles=tiles, pdl=pdl)
    if kind=='head': return K.products(x, [s['lm']], [None], lay['n1'], tiles=tiles, pdl=pdl)[0]
def state(count, lm, rows=8):
    import torch
    from fivefold.kernels.packed_decode.schedule import SPAN, Exact
    from fivefold.kernels.step.reference import Norm, Pages, Turn
    d='cuda'
    n=count*rows
    mem=torch.zeros(n,2,2,32,D,dtype=torch.bfloat16,device=d)
    table=(mem.data_ptr()+torch.arange(n*4,device=d)*32*D*2).view(n,2,2)>>4
    spans=torch.zeros(n,SPAN,dtype=torch.int32,device=d); spans[:,4]=17
    ang=torch.randn(count,D,device=d)
    return dict(turn=Turn(ang.cos().bfloat16(),ang.sin().bfloat16()),pages=Pages(spans,Exact(table,torch.bfloat16)),mem=mem,
      res=torch.randn(count,H,device=d).bfloat16(),lm=lm,x=torch.randn(count,H,device=d).bfloat16(),big=torch.randn(count,I,device=d).bfloat16())
def layer_of(l):
    from fivefold.kernels.step.reference import Norm
    a,m=l.self_attn,l.mlp
    return dict(qkv=[a.q_proj.weight,a.k_proj.weight,a.v_proj.weight],o=a.o_proj.weight,gate=m.gate_proj.weight,up=m.up_proj.weight,down=m.down_proj.weight,
      n1=Norm(l.input_layernorm.weight,1e-6),n2=Norm(l.post_attention_layernorm.weight,1e-6))
def warm(jobs):
    import torch
    from fivefold.kernels.step import triton as K
    from fivefold.kernels.step.reference import Norm
    e=lambda *s: torch.randn(*s,device='cuda',dtype=torch.bfloat16)
    with torch.inference_mode():
        lay=dict(qkv=[e(H,H),e(1024,H),e(1024,H)],o=e(H,H),gate=e(I,H),up=e(I,H),down=e(H,I),n1=Norm(e(H),1e-6),n2=Norm(e(H),1e-6))
        lm=e(V,H); bad=[]; sts={}
        for (count,kind,R,BK,W,S,late) in jobs:
            s=sts.setdefault(count, state(count,lm))
            for pdl in (True,False):
                try: call(kind,count,s,lay,s['x'],s['big'],K.Tiles(R,BK,W,S,late),pdl)
                except Exception as ex: bad.append(((count,kind,R,BK,W,S,late),str(ex)[:100]))
        torch.cuda.synchronize()
    return bad
def graph_ms(fn, reps=12):
    import torch
    fn(); torch.cuda.synchronize()
    g=torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): fn()
    g.replay(); torch.cuda.synchronize()
    ts=[]
    for _ in range(reps):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return statistics.median(ts)
def main():
    import torch
    jobs=grids()
    if '--nowarm' not in sys.argv:
        with ProcessPoolExecutor(12, mp_context=mp.get_context('spawn')) as pool:
            futs=[pool.submit(warm, jobs[i::12]) for i in range(12)]
            bad=[b for f in futs for b in f.result()]
        print('warm', round(time.time()-T0,1),'s; jobs',len(jobs),'bad',len(bad),bad[:3],flush=True)
    from fivefold.benchmark import decode
    from fivefold.kernels.step import triton as K, reference as ref
    F=torch.nn.functional
    model=decode.build('llama-3-8b',torch.device('cuda'))
    print(torch.cuda.get_device_name(), 'model', round(time.time()-T0,1),flush=True)
    lays=[layer_of(l) for l in model.model.layers]; lm=model.lm_head.weight
    bytes_={'heads':6144*H*2*32,'o':H*H*2*32,'down':H*I*2*32,'gated':2*H*I*2*32,'head':V*H*2}
    res={}
    best={}
    with torch.inference_mode():
        for count in (1,8):
            s=state(count,lm)
            x,big=s['x'],s['big']
            cub={'heads':lambda:[[F.linear(x,w) for w in l['qkv']] for l in lays],'o':lambda:[F.linear(x,l['o']) for l in lays],
              'down':lambda:[F.linear(big,l['down']) for l in lays],'gated':lambda:[[F.linear(x,l['gate']),F.linear(x,l['up'])] for l in lays],'head':lambda:F.linear(x,lm)}
            for kind in ('heads','o','down','gated','head'):
                base=graph_ms(cub[kind])
                # correctness with the first variant
                rows=[]
                mine=[j for j in jobs if j[0]==count and j[1]==kind]
                for j in mine:
                    for pdl in (True,False):
                        t=K.Tiles(*j[2:])
                        try:
                            ms=graph_ms((lambda: [call(kind,count,s,l,x,big,t,pdl) for l in lays]) if kind!='head' else (lambda: call(kind,count,s,lays[0],x,big,t,pdl)))
                            rows.append((ms,j[2:],pdl))
                        except Exception as ex: rows.append((1e9,j[2:],str(ex)[:80]))
                rows.sort(key=lambda r:r[0]); res[f'{count} {kind}']=rows
                l=lays[3]
                if kind=='heads':
                    want=ref.heads(x,l['qkv'],[None]*3,l['n1'],s['turn'])[0]
                elif kind=='o': want=ref.added(x,l['o'],None,s['res'])
                elif kind=='down': want=ref.added(big,l['down'],None,s['res'])
                elif kind=='gated': want=ref.gated(x,l['gate'],l['up'],[None]*2,l['n2'],'silu')
                else: want=ref.products(x,[lm],[None],lays[0]['n1'])[0]
                errs=[]
                for r in rows[:3]:
                    got=call(kind,count,s,lays[0] if kind=='head' else l,x,big,K.Tiles(*r[1]),r[2])
                    errs.append(float((got.float()-want.float()).norm()/want.float().norm()))
                best[count,kind]=rows[0]
                tb=bytes_[kind]/1e9
                print(f'B{count} {kind}: cuBLAS {base:.3f} ({tb/base:.2f} TB/s) | '+' | '.join(f'{r[0]:.3f} ({tb/r[0]:.2f}) {r[1]} pdl{int(r[2]==True)}' for r in rows[:4]), '| best no pdl', next((f'{r[0]:.3f} {r[1]}' for r in rows if r[2] is False),''), 'worst',f'{rows[-1][0]:.3f}', 'err',['%.1e'%e for e in errs], round(time.time()-T0,1),flush=True)
                json.dump(res,open(f'{OUT}/micro.json','w'),default=str)
            # the chain
            for pdl in (True,False):
                def chain():
                    h=s['res']
                    for l in lays:
                        q=K.heads(h,l['qkv'],[None]*3,l['n1'],s['turn'],s['pages'],tiles=K.Tiles(*best[count,'heads'][1]),pdl=pdl)[0]
                        h=K.added(q.view(count,-1),l['o'],None,h,tiles=K.Tiles(*best[count,'o'][1]),pdl=pdl)
                        g=K.gated(h,l['gate'],l['up'],[None]*2,l['n2'],'silu',tiles=K.Tiles(*best[count,'gated'][1]),pdl=pdl)
                        h=K.added(g,l['down'],None,h,tiles=K.Tiles(*best[count,'down'][1]),pdl=pdl)
                    return K.products(h,[lm],[None],lays[0]['n1'],tiles=K.Tiles(*best[count,'head'][1]),pdl=pdl)
                try:
                    ms=graph_ms(chain,30); print(f'B{count} chain pdl={pdl}: {ms:.3f} ms ({15.01/ms:.2f} TB/s)',flush=True)
                except Exception as ex: print('chain failed',pdl,repr(ex)[:300],flush=True)
    # whole steps: fused and own
    try:
        from fivefold.models import graph as G
        real=G.verified
        with torch.inference_mode():
            from fivefold.kernels.packed_decode import triton as P
            for name,context,fused,mode in (('kivi(bits=2)',4096,True,'pdl'),('kivi(bits=2)',131072,True,'pdl'),('kivi(bits=2)',4096,True,'side'),('kivi(bits=2)',4096,True,'plain'),('kivi(bits=2)',4096,False,'plain'),('kivi(bits=2)',131072,True,'side'),('full()',4096,True,'pdl')):
                P.MODE = mode
                G.verified = real if fused else (lambda *a: 'off')
                cache=decode.filled(model,name,context,1,True)
                token=torch.ones(1,1,dtype=torch.long,device='cuda')
                marks=[]; orig=torch.cuda.CUDAGraph.replay
                def replay(g):
                    a=time.perf_counter(); orig(g); marks.append((a,time.perf_counter()))
                torch.cuda.CUDAGraph.replay=replay
                rows=[]
                for i in range(40):
                    torch.cuda.synchronize(); t0=time.perf_counter(); n=len(marks)
                    token=model(token,past_key_values=cache).logits[:,-1:].argmax(-1)
                    t1=time.perf_counter(); torch.cuda.synchronize(); t2=time.perf_counter()
                    if len(marks)>n and i>10: a,b=marks[-1]; rows.append([(a-t0)*1e3,(b-a)*1e3,(t1-b)*1e3,(t2-t1)*1e3,(t2-t0)*1e3])
                torch.cuda.CUDAGraph.replay=orig
                print('step',name,context,mode,'own:',cache.step.own,'failed:',cache.step.failed,'before, replay, after, wait, all:',[round(statistics.median(c),3) for c in zip(*rows)],flush=True)
                cap=next(iter(cache.step.captured.values()))
                g=cap.graph; ts=[]
                for _ in range(20):
                    a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
                    a.record(); g.replay(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
                print('  graph alone',round(statistics.median(ts),3),flush=True)
                if mode=='pdl' and name!='full()':
                    from torch.profiler import profile, ProfilerActivity
                    with profile(activities=[ProfilerActivity.CUDA]) as prof:
                        for _ in range(3): g.replay()
                        torch.cuda.synchronize()
                    for e in sorted(prof.key_averages(),key=lambda e:-e.self_device_time_total)[:12]:
                        print('   ',e.key[:60],e.count//3,round(e.self_device_time_total/3/1000,3),flush=True)
                cache.free(); del cache, cap, g; torch.cuda.empty_cache()
    except Exception: traceback.print_exc()
if __name__=='__main__': main()
