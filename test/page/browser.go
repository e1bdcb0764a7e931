package page

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// browser is a headless Chromium with one open page. It is driven by the Chrome DevTools
// Protocol over a pipe: a JSON message each way, with a zero byte at its end.
type browser struct {
	t       *testing.T
	in      io.Writer
	out     *bufio.Reader
	session string
	calls   int
	faults  []string // exceptions of scripts, and what the page's policy has blocked
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	read, commands, err := os.Pipe()
	rig.Must(t, err)
	answers, write, err := os.Pipe()
	rig.Must(t, err)
	// As root, Chromium has no sandbox. It shows this project's page only.
	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--remote-debugging-pipe", "--user-data-dir="+filepath.Join(rig.Folder(), "chromium"))
	cmd.ExtraFiles = []*os.File{read, write} // its descriptors 3 and 4
	rig.Must(t, cmd.Start())
	read.Close()
	write.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		commands.Close()
		answers.Close()
	})
	rig.Must(t, answers.SetReadDeadline(time.Now().Add(5*time.Minute)))
	b := &browser{t: t, in: commands, out: bufio.NewReader(answers)}
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// call sends a command and reads its result.
func (b *browser) call(method string, params map[string]any, result any) {
	b.t.Helper()
	b.calls++
	message := map[string]any{"id": b.calls, "method": method, "params": params}
	if params == nil {
		delete(message, "params")
	}
	if b.session != "" {
		message["sessionId"] = b.session
	}
	_, err := b.in.Write(append(rig.JSON(b.t, message), 0))
	rig.Must(b.t, err)
	for {
		text, err := b.out.ReadBytes(0)
		rig.Must(b.t, err)
		text = bytes.TrimSuffix(text, []byte{0})
		var reply struct {
			ID     int
			Method string
			Error  struct{ Message string }
			Result json.RawMessage
		}
		rig.Must(b.t, json.Unmarshal(text, &reply))
		switch {
		case reply.Method == "Runtime.exceptionThrown" || reply.Method == "Log.entryAdded":
			b.faults = append(b.faults, string(text))
		case reply.ID != b.calls:
		case reply.Error.Message != "":
			b.t.Fatalf("%s: %s", method, reply.Error.Message)
		default:
			if result != nil {
				rig.Must(b.t, json.Unmarshal(reply.Result, result))
			}
			return
		}
	}
}

// open opens an address.
func (b *browser) open(address string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": address}, nil)
}

// eval returns the value of an expression, as text.
func (b *browser) eval(expression string) string {
	b.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails *struct{ Text string }
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	if r.ExceptionDetails != nil {
		return r.ExceptionDetails.Text
	}
	return fmt.Sprint(r.Result.Value)
}

// want waits until an expression has a value that contains a text.
func (b *browser) want(expression, text string) {
	b.t.Helper()
	rig.Eventually(b.t, time.Minute, func() error {
		if got := b.eval(expression); !strings.Contains(got, text) {
			return fmt.Errorf("%s is %q, want %q in it; the page says %q", expression, got, text,
				b.eval("document.getElementById('state').textContent"))
		}
		return nil
	})
}

// press presses a key.
func (b *browser) press(key string, code int) {
	b.t.Helper()
	text := map[string]string{"Enter": "\r"}[key]
	for _, kind := range []string{"keyDown", "keyUp"} {
		b.call("Input.dispatchKeyEvent", map[string]any{"type": kind, "key": key, "code": key, "text": text,
			"windowsVirtualKeyCode": code}, nil)
	}
}

// resize sets the size of the window, in pixels of CSS.
func (b *browser) resize(width, height int) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride",
		map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false}, nil)
}

// picture returns the window as a PNG.
func (b *browser) picture() []byte {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png"}, &shot)
	data, err := base64.StdEncoding.DecodeString(shot.Data)
	rig.Must(b.t, err)
	return data
}
