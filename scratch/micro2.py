import itertools, json, os, sys, time, statistics, traceback
from concurrent.futures import ProcessPoolExecutor
import multiprocessing as mp
T0=time.time()
OUT=os.environ.get('OUT','/tmp')
H,I,V,D=4096,14336,128256,128
def grids():
    g=[]
    few={'heads':[(4,1024,4,True),(4,512,4,True),(4,512,2,True),(2,1024,4,True)],'gated':[(4,1024,4,True),(4,512,4,True),(4,512,2,True),(2,1024,4,False)],
      'o':[(4,2048,8,False),(4,1024,4,False),(2,2048,8,False),(8,1024,8,False)],'down':[(4,2048,8,False),(8,2048,8,False),(4,1024,4,False),(8,1024,8,False)],
      'head':[(8,1024,8,True),(4,1024,4,True),(8,512,4,True)]}
    for count in (2,4,8):
        for kind,vs in few.items():
            for R,BK,W,late in (vs if count<8 else vs[1:3]): g.append((count,kind,R,BK,W,1,late))
    for count in (4,8,16,69):
        many=[(16,256,2,4),(16,128,1,6),(32,256,4,3),(16,512,4,3)] if count<=8 else [(16,256,2,4),(32,256,4,3),(32,128,4,4),(64,64,4,5)]
        if count==4: many=many[:1]
        if count==69: many=[(32,128,4,3),(64,64,4,4)]
        for kind in ('heads','o','down','gated','head'):
            for R,BK,W,S in many:
                for late in ((True,False) if count==8 else (True,)):
                    g.append((count,kind,R,BK,W,S,late))
    return g
def call(kind, count, s, lay, x, big, tiles, pdl):
    from fivefold.kernels.step import triton as K
    if tiles is not None: K.FEW = 8 if tiles.stages==1 else 1
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
    K.COLUMNS=128
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
def setkind(tiles,k,pdl):
    from fivefold.kernels.step import triton as K
    if not tiles: return {}
    K.FEW = 8 if tiles[k].stages==1 else 1
    return {'tiles':tiles[k],'pdl':pdl}
def main():
    import torch
    from fivefold.kernels.step import triton as K
    K.COLUMNS=128
    jobs=grids()
    with ProcessPoolExecutor(12, mp_context=mp.get_context('spawn')) as pool:
        futs=[pool.submit(warm, jobs[i::12]) for i in range(12)]
        bad=[b for f in futs for b in f.result()]
    print('warm', round(time.time()-T0,1),'s; jobs',len(jobs),'bad',len(bad),bad[:3],flush=True)
    from fivefold.benchmark import decode
    from fivefold.kernels.step import reference as ref
    F=torch.nn.functional
    model=decode.build('llama-3-8b',torch.device('cuda'))
    lays=[layer_of(l) for l in model.model.layers]; lm=model.lm_head.weight
    bytes_={'heads':6144*H*2*32,'o':H*H*2*32,'down':H*I*2*32,'gated':2*H*I*2*32,'head':V*H*2}
    best={}
    with torch.inference_mode():
        def chain(count,s,tiles,pdl):
            h=s['res']; t=lambda k: setkind(tiles,k,pdl)
            for l in lays:
                q=K.heads(h,l['qkv'],[None]*3,l['n1'],s['turn'],s['pages'],**t('heads'))[0]
                h=K.added(q.reshape(count,-1),l['o'],None,h,**t('o'))
                g=K.gated(h,l['gate'],l['up'],[None]*2,l['n2'],'silu',**t('gated'))
                h=K.added(g,l['down'],None,h,**t('down'))
            return K.products(h,[lm],[None],lays[0]['n1'],**t('head'))
        s=state(1,lm)
        print('B1 chain, tiles_for:', round(graph_ms(lambda: chain(1,s,None,None),30),3),flush=True)
        for count in (2,4,8,69,16):
            s=state(count,lm); x,big=s['x'],s['big']
            K.COLUMNS=0
            base=graph_ms(lambda: chain(count,s,None,None),10)
            K.COLUMNS=128
            txt=[]
            for kind in ('heads','o','down','gated','head'):
                rows=[]
                for j in [j for j in jobs if j[0]==count and j[1]==kind]:
                    for pdl in (True,False):
                        try: ms=graph_ms((lambda: [call(kind,count,s,l,x,big,K.Tiles(*j[2:]),pdl) for l in lays]) if kind!='head' else (lambda: call(kind,count,s,lays[0],x,big,K.Tiles(*j[2:]),pdl)),6)
                        except Exception as ex: rows.append((1e9,j[2:],str(ex)[:60])); continue
                        rows.append((ms,j[2:],pdl))
                rows.sort(key=lambda r:r[0]); best[count,kind]=rows
                txt.append(f"{kind} "+' '.join(f'{r[0]:.3f}{r[1]}{"P" if r[2]==True else "-"}' for r in rows[:3])+' nopdl '+next((f'{r[0]:.3f}{r[1]}' for r in rows if r[2] is False),''))
            print(f'B{count} torch chain {base:.3f} |',' | '.join(txt),flush=True)
            for pdl in (True,False):
                pick={k: K.Tiles(*next((r for r in best[count,k] if r[2] is pdl))[1]) for k in bytes_}
                try: print(f'   chain pdl={pdl}',round(graph_ms(lambda: chain(count,s,pick,pdl),10),3), {k:(v.rows,v.block,v.warps,v.stages,v.late) for k,v in pick.items()},flush=True)
                except Exception as ex: print('failed',str(ex)[:100])
            a=K.gated(x,lays[0]['gate'],lays[0]['up'],[None]*2,lays[0]['n2'],'silu'); b=ref.gated(x,lays[0]['gate'],lays[0]['up'],[None]*2,lays[0]['n2'],'silu')
            print('   err',float((a.float()-b.float()).norm()/b.float().norm()),round(time.time()-T0,1),flush=True)
if __name__=='__main__': main()
