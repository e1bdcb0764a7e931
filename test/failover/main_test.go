package failover

import (
	"testing"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

func TestMain(m *testing.M) { rig.Main(m, "make test-queues") }
