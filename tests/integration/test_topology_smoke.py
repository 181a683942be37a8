from cellferry.model import *
from cellferry.topology import Topology
def test_smoke(fresh_database):
    a=Actor("me")
    with Topology(fresh_database) as t:
        assert t.install(); assert t.install()==[]
        t.register_cell("c1","eu",True); t.register_cell("c2","eu")
        o=Organization("7","acme")
        print(t.register_organization(o,"c1",a)); t.register_organization(o,"c1",a)
        m=t.create_migration(o,"c2","online",{"url":"postgresql://u:pw@h/db"},{"x":1},a)
        n=t.take_lease(m.id,"h",a)
        for x,y in [("planned","copying"),("copying","syncing"),("syncing","ready"),("ready","cutting_over")]:
            m=t.transition(m.id,n,x,y,a,{"f":x})
        t.check_lease(m.id,n)
        print(t.flip(m.id,n,a,0.0,{})); assert t.flip_outcome(m.id)
        m=t.transition(m.id,n,"soaking","retained",a)
        t.may_clean(m.id)
        m=t.transition(m.id,n,"retained","cleaning",a)
        m=t.transition(m.id,n,"cleaning","completed",a)
        r=t.resources(m.id); x=Resource("c1","pg","gate","g"); r.intend(x); print(t.registered_resources()); r.forget(x); assert not t.live_resources(m.id)
        s=t.progress_sink(m.id,n); s.report("pg","copy",5,10,"rows"); s.check(); print(t.progress(m.id))
        for e in t.audit(m.id): print(e)
        print(m, t.organizations(), t.cells(), t.route_history("7"), t.now(), t.lease(m.id), t.expired_leases(1))
