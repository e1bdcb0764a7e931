package failover

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	"golang.org/x/net/dns/dnsmessage"
)

// podDNS starts the DNS of pods, which have the search domains of a cluster. A name in it
// takes three questions, one after the other.
func podDNS(t *testing.T, address string) *rig.DNS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for port 53 and a resolv.conf of its own")
	}
	return rig.StartDNS(t, address)
}

// named gives a server a name in the DNS. It returns NAME:PORT.
func named(d *rig.DNS, name, address string) string {
	host, port, _ := net.SplitHostPort(address)
	d.Set(name+".cluster.local", host)
	return net.JoinHostPort(name, port)
}

// Lock servers by name, behind a DNS that takes longer for a name than an attempt to lock
// may take.
func TestSlowDNSOfLockServers(t *testing.T) {
	t.Parallel()
	for mode, c := range map[string]struct {
		address string
		delay   time.Duration
	}{
		"redlock": {"127.0.53.1:53", 200 * time.Millisecond},
		"etcd":    {"127.0.53.2:53", 1200 * time.Millisecond},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d, queue := podDNS(t, c.address), rig.StartRedis(t)
			addresses := rig.StartLockServers(t, 3, rig.RedisOptions{}).Addresses()
			if mode == "etcd" {
				addresses = rig.EtcdAddresses(rig.StartEtcd(t, 3))
			}
			var names []string
			for i, address := range addresses {
				names = append(names, named(d, fmt.Sprintf("%s-%d.redis.hook.svc", mode, i), address))
			}
			flags := []string{"--lock-mode=" + mode, "--redis-addresses=" + strings.Join(names, ","),
				"--etcd-addresses=" + strings.Join(names, ",")}
			d.Delay.Store(int64(c.delay))
			program := rig.ProgramInPod(t, d)
			w := rig.StartWebhookOf(t, program, queue.Address, flags...)
			admit := func() error {
				start := time.Now()
				_, err := w.TryAdmit(rig.Review(t, rig.FreshID(), 1)) // needs a repair, and so the lock
				t.Logf("an admission took %.2f s: %v", time.Since(start).Seconds(), err)
				return err
			}
			rig.Eventually(t, 10*time.Second, admit)
			for range 5 {
				rig.Must(t, admit())
			}

			id, token := rig.FreshID(), rig.InPod(t, "")
			p := rig.NewProcess(program, append([]string{"sidecar", "--queue-redis-address=" + queue.Address, "--length=1",
				"--heartbeat-interval-seconds=1", "--stale-threshold-seconds=120"}, append(flags, id.String(), token)...)...)
			p.Cmd.Env = append(os.Environ(), "POD_UID="+token)
			start := time.Now()
			p.Start(t)
			p.WantLog(t, rig.HeldText)
			t.Logf("the sidecar of a waiting pod had its token after %.2f s", time.Since(start).Seconds())
		})
	}
}

// A queue by name, behind a DNS that takes longer for a name than a connection may take.
func TestSlowDNSOfTheQueue(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		address string
		delay   time.Duration
		fault   rig.DNSFault
	}{
		"slow": {"127.0.53.3:53", 700 * time.Millisecond, nil},
		"without answers about IPv6": {"127.0.53.4:53", 0, func(q dnsmessage.Question, _ int) (dnsmessage.RCode, bool) {
			return dnsmessage.RCodeSuccess, q.Type == dnsmessage.TypeAAAA
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := podDNS(t, c.address)
			d.SetFault(c.fault)
			queue := rig.StartRedis(t)
			address := named(d, "redis-0.redis.hook.svc", queue.Address)
			d.Delay.Store(int64(c.delay))
			start := time.Now()
			w := rig.StartWebhookOf(t, rig.ProgramInPod(t, d), address, "--redis-addresses="+queue.Address)
			t.Logf("the webhook is ready after %.2f s", time.Since(start).Seconds())
			w.WantAdmitted(t, rig.FreshID(), 1)
		})
	}
}
